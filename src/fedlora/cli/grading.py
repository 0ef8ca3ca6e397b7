"""The command that runs model-written programs: grade."""

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli.speech import Json, answer, numbers


def grade(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS.jsonl", help='{"task_id", "completion"} lines, several a task.')
    ],
    data: Annotated[str, typer.Option(help="The benchmark: a folder, a file or a hub id.")],
    benchmark: Annotated[Optional[str], typer.Option(help="humaneval or mbpp [default: by its columns].")] = None,  # noqa: UP045
    split: Annotated[str, typer.Option(help="Of a folder or a hub id.")] = "test",
    k: Annotated[str, typer.Option("--k", help="pass@k, with commas, e.g. 1,10.")] = "1",
    workers: Annotated[int, typer.Option(min=1, help="Programs at the same time.")] = min(4, os.cpu_count() or 1),
    seconds: Annotated[int, typer.Option(min=1, help="Processor time of one program.")] = 10,
    memory_mb: Annotated[int, typer.Option(min=64, help="Memory of one program.")] = 512,
    out: Annotated[Optional[Path], typer.Option(help="The verdicts [default: PREDICTIONS.verdicts.jsonl].")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Run the programs that a model wrote for HumanEval or MBPP, confined, and count what passes (Linux)."""
    from fedlora import grading
    from fedlora.report import tables
    from fedlora.report.progress import Counted
    from fedlora.sandbox import Sandbox

    ks = numbers(k, int, "--k", "1,10")
    box = Sandbox(seconds=seconds, wall_seconds=6.0 * seconds, memory_mb=memory_mb)
    with Counted("programs") as bar:
        found = grading.grade(predictions, data, benchmark, split, ks, workers, box, out, bar.done)
    answer(as_json, found, lambda: tables.grades(found))
