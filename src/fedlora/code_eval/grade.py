"""A file of model-written programs, graded: read, run, counted, and a verdict written for each."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedlora.code_eval.problems import Problem, Verdict, figures, problems, run_answers
from fedlora.code_eval.sandbox import Sandbox
from fedlora.files import check_output_file, write
from fedlora.registry import nearest
from fedlora.tasks.data import rows as source


def rows(data: str, split: str = "test") -> list[dict[str, Any]]:
    """A benchmark's rows from a file, from one split of a folder, or of a hub id."""
    split = source.ONLY if Path(data).expanduser().is_file() else split
    try:
        return list(source.splits(data, None, split, [split], 0)[1])
    except ValueError as error:  # there is no [task] table here
        raise ValueError(str(error).replace("task.train_split", "--split")) from error


def answers(path: str | Path, known: Sequence[Problem]) -> dict[str, list[str]]:
    """``{"task_id", "completion"}`` lines, several a task allowed: task -> its completions, in the file's order.

    ``ValueError`` names the line that is none, or whose task is unknown.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f'there is no file {str(path)!r}; name a file of {{"task_id", "completion"}} lines.')
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
            text = lines.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no text that can be read; it needs lines of JSON in UTF-8.") from error
    found: dict[str, list[str]] = {problem.task_id: [] for problem in known}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            task, completion = _answer(line, f"line {number} of {str(path)!r}")
            if task not in found:
                near = nearest(task, found)
                hint = f"did you mean {near!r}?" if near else f"its tasks are {_first(list(found))}."
                raise ValueError(f"line {number} of {str(path)!r} answers task {task!r}, which is not there; {hint}")
            found[task].append(completion)
    if not any(found.values()):
        raise ValueError(f'{str(path)!r} holds no answers; it needs {{"task_id", "completion"}} lines.')
    return found


def _answer(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); each line is one object.") from error
    if not isinstance(row, dict) or not {"task_id", "completion"} <= row.keys():
        raise ValueError(f'{where} lacks "task_id" or "completion"; each line needs both.')
    if not isinstance(row["completion"], str) or not isinstance(row["task_id"], str | int):
        raise ValueError(f"{where} has a completion or a task_id that is no text; both are strings.")
    return str(row["task_id"]), row["completion"]


def _first(names: list[str]) -> str:
    return f"{names[0]} to {names[-1]}"


def grade(
    predictions: str | Path,
    data: str,
    benchmark: str | None = None,
    split: str = "test",
    ks: Sequence[int] = (1,),
    workers: int = 1,
    sandbox: Sandbox | None = None,
    out: str | Path | None = None,
    done: Callable[[Verdict], None] = lambda verdict: None,
) -> dict[str, Any]:
    """Runs every completion of a file; a verdict a line goes to ``out`` (None: beside the file).

    A problem without a completion counts as wrong, and ``missing`` says how many there are. ``ValueError`` where the
    file, the data or ``ks`` do not fit, or no code can be run here.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"--k is {','.join(map(str, ks))!r}; it is one or several numbers of at least 1, e.g. 1,10.")
    known = problems(rows(data, split), benchmark)
    given = answers(predictions, known)
    figures(known, [_unrun(task, i) for task, texts in given.items() for i in range(len(texts))], ks)  # enough for k?
    place = check_output_file(out or _beside(Path(predictions).expanduser()))
    verdicts = run_answers(known, given, sandbox, workers, done)
    lines = (json.dumps(vars(v)) + "\n" for v in verdicts)
    write(place, "".join(lines).encode())
    return {
        "figures": figures(known, verdicts, ks),
        "problems": len(known),
        "missing": sum(not texts for texts in given.values()),
        "answers": len(verdicts),
        "passed": sum(v.passed for v in verdicts),
        "verdicts": str(place),
    }


def _unrun(task: str, sample: int) -> Verdict:
    return Verdict(task, sample, False, "", 0.0)


def _beside(path: Path) -> Path:
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return path.with_name(f"{name}.verdicts.jsonl")
