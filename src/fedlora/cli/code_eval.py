"""Commands for programs that a model writes: solve, grade."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._options import Json, parse_numbers, print_result, say

Data = Annotated[str, typer.Option(help="HumanEval or MBPP: a folder, a file or a hub id.")]
Benchmark = Annotated[str | None, typer.Option(help="humaneval or mbpp [default: by its columns].")]
Split = Annotated[str, typer.Option(help="Of a folder or a hub id.")]


def grade_command(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS.jsonl", help='{"task_id", "completion"} lines, several a task.')
    ],
    data: Data,
    benchmark: Benchmark = None,
    split: Split = "test",
    k: Annotated[str, typer.Option("--k", help="pass@k, with commas, e.g. 1,10.")] = "1",
    workers: Annotated[int, typer.Option(min=1, help="Programs at the same time.")] = min(4, os.cpu_count() or 1),
    seconds: Annotated[int, typer.Option(min=1, help="Processor time of one program.")] = 10,
    memory_mb: Annotated[int, typer.Option(min=64, help="Memory of one program.")] = 512,
    out: Annotated[Path | None, typer.Option(help="The verdicts [default: PREDICTIONS.verdicts.jsonl].")] = None,
    as_json: Json = False,
) -> None:
    """Run the programs that a model wrote for HumanEval or MBPP, confined, and count those that pass (Linux)."""
    from fedlora.code_eval.grade import grade_file, tabulate_grades
    from fedlora.code_eval.sandbox import Sandbox
    from fedlora.runs.progress import LiveBar

    ks = parse_numbers(k, int, "--k", "1,10")
    box = Sandbox(seconds=seconds, wall_seconds=6.0 * seconds, memory_mb=memory_mb)
    with LiveBar(None, "programs") as bar:
        result = grade_file(predictions, data, benchmark, split, ks, workers, box, out, lambda grade: bar.advance(1))
    print_result(as_json, result, lambda: [tabulate_grades(result)])


def solve_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a causal-lm run.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="The answers, for fedlora grade; an existing file is continued.")],
    benchmark: Benchmark = None,
    split: Split = "test",
    client: Annotated[int | None, typer.Option(help="This client's own model [default: the shared one].")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Problems at a time.")] = 16,
    worded: Annotated[bool, typer.Option("--worded", help="Ask with the run's prompt template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Let a run's model write programs for HumanEval or MBPP; nothing is run."""
    from fedlora.code_eval.grade import read_benchmark
    from fedlora.code_eval.problems import parse_problems
    from fedlora.code_eval.solve import write_answers
    from fedlora.runs.chat import Chat
    from fedlora.runs.folder import RunFolder
    from fedlora.runs.progress import LiveBar
    from fedlora.tasks.networks.generation import GenerationSettings

    writing = GenerationSettings(max_new_tokens, temperature, top_p)
    problems = parse_problems(read_benchmark(data, split), benchmark)
    talk = Chat.open(RunFolder.open(folder), client, seed=seed)
    with LiveBar(samples * len(problems), "answers") as bar:
        result = write_answers(talk, problems, out, writing, samples, batch_size, worded, bar.advance)
    print_result(as_json, result, whole=[f"{result['answers']} answers to {result['problems']} problems in {out}."])
    if result["too_long"]:
        say(f"{result['too_long']} problems leave no room for an answer of {max_new_tokens} tokens, and have none.")
    say(f"Next: fedlora grade {out} --data {data}")
