"""Grading a file of model-written programs: read it, run each program, count, and write a verdict for each."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.code_eval.problems import Graded, Problem, compute_pass_rates, parse_problems, run_answers
from fedlora.code_eval.sandbox import Sandbox
from fedlora.files import check_output_file, write
from fedlora.registry import nearest
from fedlora.runs.table import Table, from_pairs
from fedlora.tasks.data import rows as source


def read_benchmark(data: str, split: str = "test") -> list[dict[str, Any]]:
    """Read a benchmark's rows from a file, or from one split of a folder or of a hub id."""
    split = source.ONLY if Path(data).expanduser().is_file() else split
    try:
        return list(source.load_splits(data, None, split, [split], 0)[1])
    except ValueError as error:  # this data comes from an option and not from a [task] table
        raise ValueError(str(error).replace("task.train_split", "--split")) from error


def read_answers(path: str | Path, problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Read lines of ``{"task_id", "completion"}`` as task -> completions, in the file's order.

    Raises ``ValueError`` with the number of a line that is malformed or names an unknown task.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f'there is no file {str(path)!r}; name a file of {{"task_id", "completion"}} lines.')
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
            text = lines.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no text that can be read; it needs lines of JSON in UTF-8.") from error
    answers: dict[str, list[str]] = {problem.task_id: [] for problem in problems}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        task, completion = _parse_answer(line, where)
        if task not in answers:
            near, tasks = nearest(task, answers), list(answers)
            hint = f"did you mean {near!r}?" if near else f"its tasks are {tasks[0]} to {tasks[-1]}."
            raise ValueError(f"{where} answers task {task!r}, which is not in the data; {hint}")
        answers[task].append(completion)
    if not any(answers.values()):
        raise ValueError(f'{str(path)!r} holds no answers; it needs {{"task_id", "completion"}} lines.')
    return answers


def _parse_answer(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); each line is one object.") from error
    if not isinstance(row, dict) or not {"task_id", "completion"} <= row.keys():
        raise ValueError(f'{where} lacks "task_id" or "completion"; each line needs both.')
    if not isinstance(row["completion"], str) or not isinstance(row["task_id"], str | int):
        raise ValueError(f"{where} has a completion or a task_id that is no text; both are strings.")
    return str(row["task_id"]), row["completion"]


def grade_file(
    predictions: str | Path,
    data: str,
    benchmark: str | None = None,
    split: str = "test",
    ks: Sequence[int] = (1,),
    workers: int = 1,
    sandbox: Sandbox | None = None,
    out: str | Path | None = None,
    done: Callable[[Graded], None] = lambda graded: None,
) -> dict[str, Any]:
    """Run every completion of a file, and write a line of JSON for each to ``out`` (None: beside the file).

    A problem without a completion counts as wrong, and ``missing`` is the number of these. Raises ``ValueError`` if
    the file, the data or ``ks`` do not fit together, or if this machine cannot confine a program.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"--k is {','.join(map(str, ks))!r}; it is one or several numbers of at least 1, e.g. 1,10.")
    problems = parse_problems(read_benchmark(data, split), benchmark)
    answers = read_answers(predictions, problems)
    unrun = [Graded(task, i, False, "", 0.0) for task, texts in answers.items() for i in range(len(texts))]
    compute_pass_rates(problems, unrun, ks)  # raises an error before anything is run if k is too large
    path = Path(predictions).expanduser()
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    target = check_output_file(out or path.with_name(f"{stem}.verdicts.jsonl"))
    graded = run_answers(problems, answers, sandbox, workers, done)
    write(target, "".join(json.dumps(vars(answer)) + "\n" for answer in graded).encode())
    return {
        "figures": compute_pass_rates(problems, graded, ks),
        "problems": len(problems),
        "missing": sum(not texts for texts in answers.values()),
        "answers": len(graded),
        "passed": sum(answer.passed for answer in graded),
        "verdicts": str(target),
    }


def tabulate_grades(result: Mapping[str, Any]) -> Table:
    """Build the table of the result of ``grade_file``."""
    rows = [(name, f"{value:.4f}") for name, value in result["figures"].items()]
    rows.append(("answers that pass", str(result["passed"])))
    if result["missing"]:
        rows.append(("problems without an answer, counted as wrong", str(result["missing"])))
    title = f"{result['answers']} answers to {result['problems']} problems"
    return from_pairs(title, [*rows, ("verdicts", result["verdicts"])])
