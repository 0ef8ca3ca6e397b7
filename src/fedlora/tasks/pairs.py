"""Pairs of texts from rows: what is asked, and the answers that are right."""

from collections.abc import Sequence
from typing import Any

from fedlora.tasks import data as source
from fedlora.tasks.labels import Classes
from fedlora.tasks.wording import columns, filled, template

# Templates over the columns that public sets use, tried in this order where nothing is named.
USUAL = (
    ("question: {question} context: {context}", "answers"),  # SQuAD, MRQA
    ("{source}", "target"), ("{input}", "target"), ("{text}", "label_text"), ("{text}", "label"),
)  # fmt: skip


def texts(
    split: Any, asked: str | None, answer: str | None, names: Sequence[str] | None = None, what: str = "training"
) -> tuple[list[str], list[list[str]], list[str]]:
    """Each row's source, its right answers, the first of which is learnt, and notes on how they were read.

    ``asked`` and ``answer`` are columns or templates; None: the first usual ones that the data has. ``names`` are all
    texts that a target may be; None: what the data itself says. ``ValueError`` names a column that is not there or
    holds something else.
    """
    asked, answer = _columns(split, asked, answer)
    sources = filled(asked, split, "task.source")
    if "{" in answer:
        return sources, [[text] for text in filled(answer, split, "task.target")], []
    if names:
        classes = Classes(tuple(names), True, key="task.target")
        numbers = classes.of_rows(split, answer, what).tolist()
        return sources, [[names[i]] for i in numbers], classes.notes(split, answer, what)
    own = getattr(split.features.get(answer), "names", None)
    return sources, [_golds(value, own, answer) for value in source.column(split, answer, "task.target")], []


def _columns(split: Any, asked: str | None, answer: str | None) -> tuple[str, str]:
    if asked is not None and answer is not None:
        return template(asked), answer
    for usual, known in USUAL:
        if {*columns(usual), known} <= set(split.column_names):
            return usual, known
    raise ValueError(
        f"no source and target were found among {', '.join(split.column_names)}; set task.source and task.target."
    )


def _golds(value: Any, names: Sequence[str] | None, column: str) -> list[str]:
    """A row's right answers; a list without any is one that has nothing to say (SQuAD 2)."""
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
        raise ValueError(f"column {column!r} (task.target) holds an empty text; fill or drop these rows.")
    return [str(found)]
