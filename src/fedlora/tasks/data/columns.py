"""Pairs of texts from rows: what is asked, and the answers that are right."""

from collections.abc import Sequence
from typing import Any

from fedlora.tasks.data import rows as source
from fedlora.tasks.data.labels import Classes
from fedlora.tasks.data.templates import columns, filled, template

# Templates over the columns that public sets use, tried in this order where nothing is named.
USUAL = (
    ("question: {question} context: {context}", "answers"),  # SQuAD, MRQA
    ("{source}", "target"), ("{input}", "target"), ("{text}", "label_text"), ("{text}", "label"),
)  # fmt: skip
DROP = "fill or drop these rows, or set task.drop_unlearnable = true"


def texts(
    split: Any, asked: str | None, answer: str | None, names: Sequence[str] | None = None, what: str = "training",
    blank: bool = False,
) -> tuple[list[str], list[list[str]], list[str]]:  # fmt: skip
    """Each row's source, its right answers, the first of which is learnt, and notes on how they were read.

    ``asked`` and ``answer`` are columns or templates; None: the first usual ones that the data has. ``names`` are all
    texts that a target may be; None: what the data itself says. ``blank`` lets a row be without a target, and so
    without answers. ``ValueError`` names a column that is not there or holds something else.
    """
    asked, answer = _columns(split, asked, answer)
    sources = filled(asked, split, "task.source")
    if "{" in answer:
        targets = filled(answer, split, "task.target", optional=blank)
        empty = sum(not text.strip() for text in targets)
        if empty and not blank:
            raise ValueError(f"task.target is empty in {empty} of {len(targets)} rows; {DROP}.")
        return sources, [[text] if text.strip() else [] for text in targets], []
    values = source.cells(split, answer, "task.target") if blank else source.column(split, answer, "task.target")
    if names:
        return sources, *_named(split, answer, values, Classes(tuple(names), True, key="task.target"), what)
    own = getattr(split.features.get(answer), "names", None)
    return sources, [_golds(value, own, answer, blank) for value in values], []


def _named(
    split: Any, answer: str, values: Sequence[Any], classes: Classes, what: str
) -> tuple[list[list[str]], list[str]]:
    """The name of each row's class, none where the target is missing; and notes on how they were read."""
    there = [i for i, value in enumerate(values) if not _is_blank(value)]
    rows = split if len(there) == len(values) else split.select(there)
    found: list[list[str]] = [[] for _ in values]
    for i, number in zip(there, classes.of_rows(rows, answer, what).tolist(), strict=True):
        found[i] = [classes.names[number]]
    return found, classes.notes(rows, answer, what)


def _columns(split: Any, asked: str | None, answer: str | None) -> tuple[str, str]:
    if asked is not None and answer is not None:
        return template(asked), answer
    for usual, known in USUAL:
        if {*columns(usual), known} <= set(split.column_names):
            return usual, known
    raise ValueError(
        f"no source and target were found among {', '.join(split.column_names)}; set task.source and task.target."
    )


def _golds(value: Any, names: Sequence[str] | None, column: str, blank: bool) -> list[str]:
    """A row's right answers; a list without any is one that has nothing to say (SQuAD 2)."""
    if blank and _is_blank(value):
        return []
    found = value["text"] if isinstance(value, dict) and "text" in value else value
    if isinstance(found, list) and all(isinstance(text, str) for text in found):
        return found or [""]
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise ValueError(f"column {column!r} (task.target) holds {value!r}; it needs text, or a list of texts.")
    if isinstance(found, int) and names is not None:
        if not 0 <= found < len(names):
            raise ValueError(f"column {column!r} (task.target) holds {found}, but there are {len(names)} label names.")
        return [names[found]]
    if not str(found).strip():
        raise ValueError(f"column {column!r} (task.target) holds an empty text; {DROP}.")
    return [str(found)]


def _is_blank(value: Any) -> bool:
    return source.is_missing(value) or (isinstance(value, str) and not value.strip())
