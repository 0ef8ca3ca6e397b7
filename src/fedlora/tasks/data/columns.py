"""Pairs of texts from rows: the source and its right answers."""

from collections.abc import Sequence
from typing import Any

from fedlora.tasks.data.labels import Classes
from fedlora.tasks.data.rows import is_missing, read_column
from fedlora.tasks.data.templates import fill_rows, template_columns, to_template

# Templates over the usual columns of public data sets, tried in this order if nothing is set.
USUAL = (
    ("question: {question} context: {context}", "answers"),  # SQuAD, MRQA
    ("{source}", "target"), ("{input}", "target"), ("{text}", "label_text"), ("{text}", "label"),
)  # fmt: skip
DROP = "fill or drop these rows, or set task.drop_unlearnable = true"


def read_pairs(
    split: Any, source: str | None, target: str | None, names: Sequence[str] | None = None, role: str = "training",
    allow_empty: bool = False,
) -> tuple[list[str], list[list[str]], list[str]]:  # fmt: skip
    """Return each row's source, its right answers, the first of which is learnt, and notes on how they were read.

    ``source`` and ``target`` are columns or templates; None: the first usual ones that the data has. ``names`` are all
    texts that a target may be; None: any. With ``allow_empty`` a row without a target has no answers. Raises
    ``ValueError`` if a column is missing or has other values.
    """
    source, target = _choose_columns(split, source, target)
    sources = fill_rows(source, split, "task.source")
    if "{" in target:
        targets = fill_rows(target, split, "task.target", allow_missing=allow_empty)
        empty = sum(not text.strip() for text in targets)
        if empty and not allow_empty:
            raise ValueError(f"task.target is empty in {empty} of {len(targets)} rows; {DROP}.")
        return sources, [[text] if text.strip() else [] for text in targets], []
    values = read_column(split, target, "task.target", allow_empty)
    if names:
        return sources, *_class_names(split, target, values, Classes(tuple(names), True, key="task.target"), role)
    label_names = getattr(split.features.get(target), "names", None)
    return sources, [_read_answers(value, label_names, target, allow_empty) for value in values], []


def _class_names(
    split: Any, target: str, values: Sequence[Any], classes: Classes, role: str
) -> tuple[list[list[str]], list[str]]:
    """Return the name of each row's class, or nothing if the target is missing, and notes on how they were read."""
    present = [i for i, value in enumerate(values) if not _is_blank(value)]
    rows = split if len(present) == len(values) else split.select(present)
    answers: list[list[str]] = [[] for _ in values]
    for i, number in zip(present, classes.of_rows(rows, target, role).tolist(), strict=True):
        answers[i] = [classes.names[number]]
    return answers, classes.notes(rows, target, role)


def _choose_columns(split: Any, source: str | None, target: str | None) -> tuple[str, str]:
    if source is not None and target is not None:
        return to_template(source), target
    for template, column in USUAL:
        if {*template_columns(template), column} <= set(split.column_names):
            return template, column
    raise ValueError(f"no source and target among {', '.join(split.column_names)}; set task.source and task.target.")


def _read_answers(value: Any, names: Sequence[str] | None, column: str, allow_empty: bool) -> list[str]:
    """Return a row's right answers. An empty list of answers means an unanswerable question (SQuAD 2): ``[""]``."""
    if allow_empty and _is_blank(value):
        return []
    answer = value["text"] if isinstance(value, dict) and "text" in value else value
    if isinstance(answer, list) and all(isinstance(text, str) for text in answer):
        return answer or [""]
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        raise ValueError(f"column {column!r} (task.target) holds {value!r}; it needs text, or a list of texts.")
    if isinstance(answer, int) and names is not None:
        if not 0 <= answer < len(names):
            raise ValueError(f"column {column!r} (task.target) holds {answer}, but there are {len(names)} label names.")
        return [names[answer]]
    if not str(answer).strip():
        raise ValueError(f"column {column!r} (task.target) holds an empty text; {DROP}.")
    return [str(answer)]


def _is_blank(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())
