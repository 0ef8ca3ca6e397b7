"""Class labels: which value of a column is which class. Names decide, so that all parties of a federation agree."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora.registry import nearest
from fedlora.tasks.data import rows as source

NAME, POSITION = "name", "position"
READINGS = ("", NAME, POSITION)  # how a column's values are matched with classes; "": they are no classes
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
MOST = 10  # values or names that a sentence lists


class Targets(NamedTuple):
    """What is learnt of the training and the test rows."""

    train: Tensor  # (N,) int64, or float32 where the target is a number
    test: Tensor
    names: tuple[str, ...]  # of the head's outputs
    notes: tuple[str, ...] = ()
    reading: str = ""  # one of READINGS


@dataclass(frozen=True)
class Classes:
    """The classes of a task: their names in the order of the head's outputs, and the rule that reads values as them.

    A text, a ``ClassLabel`` and a boolean are matched by name. A number is matched by name where a name is a number,
    and else is a position among ``names``, provided that somebody has put these in order.
    """

    names: tuple[str, ...]
    ordered: bool  # whether task.label_names or the data itself gives the order
    kept: tuple[int, ...] = ()  # those that task.labels keeps, in order; empty: all
    key: str = "task.label"  # the setting that names the column

    @classmethod
    def of(cls, splits: Sequence[Any], column: str, given: Sequence[str] | None, keep: Collection[Any] | None):
        """The classes of ``given`` names, of a ``ClassLabel``, or of the distinct values of all training rows.

        ``splits`` are the training and the test splits before rows are drawn from them, so that no draw changes the
        classes. ``ValueError`` where there are fewer than two, or where ``keep`` names one that there is not.
        """
        declared = given or getattr(_feature(splits[0], column), "names", None)
        names = tuple(declared) if declared else _distinct(splits, column)
        if len(names) < 2:
            raise ValueError(f"column {column!r} holds only {len(names)} label; a classification needs at least 2.")
        return cls(names, bool(declared)).keeping(keep)

    def keeping(self, keep: Collection[Any] | None) -> "Classes":
        """Only those that ``task.labels`` names, by name or as the rows have them."""
        if keep is None:
            return self
        found = {value: self.find(value) for value in keep}
        for value, number in found.items():
            if number is None:
                raise ValueError(f"task.labels has {value!r}, which is no label; the labels are {listed(self.names)}.")
        kept = tuple(sorted({number for number in found.values() if number is not None}))
        if len(kept) < 2:
            raise ValueError(f"task.labels keeps only {len(kept)} label; a classification needs at least 2.")
        return Classes(self.names, self.ordered, kept)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the head's outputs."""
        return tuple(self.names[i] for i in self.kept) if self.kept else self.names

    @cached_property
    def _by_name(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _by_number(self) -> Mapping[Decimal, list[int]]:
        """Those whose names are numbers."""
        found: dict[Decimal, list[int]] = {}
        for i, name in enumerate(self.names):
            if is_number(name):
                found.setdefault(Decimal(name), []).append(i)
        return found

    def find(self, value: Any, own: Sequence[str] | None = None) -> int | None:
        """The place of a value's class among ``names``; None where it has none. ``own`` are a ClassLabel's names."""
        if own is not None:
            value = own[value] if 0 <= value < len(own) else None
        if isinstance(value, str):
            return self._by_name.get(value)
        if isinstance(value, bool):
            alike = [i for i, name in enumerate(self.names) if name.casefold() == str(value).casefold()]
            return alike[0] if len(alike) == 1 else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return self._of_number(value)

    def _of_number(self, value: float) -> int | None:
        if not self._by_number:
            fits = self.ordered and float(value).is_integer() and 0 <= value < len(self.names)
            return int(value) if fits else None
        several = self._by_number.get(Decimal(value_name(value)), [])
        if len(several) > 1:
            one, other, *_ = (self.names[i] for i in several)
            raise ValueError(
                f"the label {value_name(value)} is {one!r} as well as {other!r} in task.label_names; write labels as "
                "text in the data, or rename one of them."
            )
        return several[0] if several else None

    def reading(self, split: Any, column: str) -> str:
        """``NAME`` or ``POSITION``: how this split's values are matched."""
        numeric = _own(split, column) is None and any(_is_numeric(v) for v in split[column])
        return POSITION if numeric and not self._by_number else NAME

    def values(self, split: Any, column: str) -> set[Any] | None:
        """The values of a split whose rows are kept; None: all."""
        if not self.kept:
            return None
        own = _own(split, column)
        distinct = set(source.column(split, column, self.key))
        return {value for value in distinct if _is_label(value) and self.find(value, own) in self.kept}

    def targets(self, train: Any, test: Any, column: str) -> Targets:
        """Both splits' classes, and what has to be said of how they were read."""
        parts = (train, "training"), (test, "test")
        numbers = [self.of_rows(split, column, what) for split, what in parts]
        notes = [note for split, what in parts for note in self.notes(split, column, what)]
        by_position = POSITION in (self.reading(train, column), self.reading(test, column))
        return Targets(*numbers, self.outputs, tuple(notes), POSITION if by_position else NAME)

    def of_rows(self, split: Any, column: str, what: str) -> Tensor:
        """Each row's class, (N,) int64, counted from 0 among ``outputs``. ``ValueError`` names values of no class."""
        values = source.column(split, column, self.key)
        _check(values, column, self.key, what)
        own = _own(split, column)
        places = {i: place for place, i in enumerate(self.kept or range(len(self.names)))}
        found = {value: self.find(value, own) for value in dict.fromkeys(values)}
        strange = [value for value, i in found.items() if i not in places]
        if strange:
            raise ValueError(self._strangers(strange, own, column, what))
        return torch.tensor([places[found[value]] for value in values], dtype=torch.int64)

    def _strangers(self, strange: Sequence[Any], own: Sequence[str] | None, column: str, what: str) -> str:
        said = [own[v] if own is not None and 0 <= v < len(own) else v for v in strange]
        words = [v for v in said if isinstance(v, str)]
        near = nearest(words[0], self.names) if words else None
        hint = f"; did you mean {near!r}?" if near else ""
        if not self.ordered:
            whose = f"the training rows have {listed(self.names)}"
        elif words or self._by_number:
            whose = f"the labels are {listed(self.names)}"
        else:
            whose = f"no label name is a number, so that numbers are positions, {positions(self.names)}"
        which = "which matches no label" if len(said) == 1 else "which match no label"
        return (
            f"column {column!r} ({self.key}) holds {listed(said)} in the {what} rows, {which}{hint}; {whose}; correct "
            "the rows, or set task.label_names to all labels in their order."
        )

    def notes(self, split: Any, column: str, what: str) -> list[str]:
        """What has to be said of how labels are read: numbers that are positions, and numbers that are none."""
        if self.reading(split, column) == POSITION:
            return [position_note(column, what, self.names)]
        counted = self.names == tuple(map(str, range(len(self.names))))
        if what == "training" and not self.ordered and self._by_number and not counted:
            return [
                f"the labels of column {column!r} are numbers: {listed(self.names)}; they are {len(self.names)} "
                "classes, named by their values."
            ]
        return []


def label_map(names: Sequence[str], outputs: Collection[str], reading: str) -> dict[str, str]:
    """Which value is which class by a reading, for whoever checks a run later: value -> name of the class."""
    pairs = ((str(i) if reading == POSITION else name, name) for i, name in enumerate(names))
    return {value: name for value, name in pairs if name in outputs}


def position_note(column: str, what: str, names: Sequence[str]) -> str:
    """The sentence about numbers that are read as positions."""
    return (
        f"the labels of column {column!r} in the {what} rows are numbers, and none of the label names is one: they are "
        f"read as positions, {positions(names)}."
    )


def positions(names: Sequence[str]) -> str:
    """Which number is which name."""
    return listed([f"{i} = {name}" for i, name in enumerate(names)], quoted=False)


def check_names(names: Sequence[str] | None) -> None:
    """``ValueError`` where names of labels occur twice."""
    twice = [name for name, count in Counter(names or ()).items() if count > 1]
    if twice:
        raise ValueError(f"task.label_names has {twice[0]!r} twice; each label has one name, so rename or drop one.")


def is_number(name: str) -> bool:
    """Whether a name is written as a number."""
    return NUMBER.fullmatch(name) is not None


def value_name(value: Any) -> str:
    """A value as the name of a class: 3 and 3.0 are "3"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def listed(values: Sequence[Any], quoted: bool = True) -> str:
    """Some values for a sentence, texts in quotes; of many, the first and the last."""
    said = [repr(v) if quoted and isinstance(v, str) and not is_number(v) else str(v) for v in values]
    if len(said) > MOST:
        said = [*said[: MOST - 2], "...", said[-1]]
    return ", ".join(said)


def _feature(split: Any, column: str) -> Any:
    source.present(split, column, "task.label")
    return split.features[column]


def _own(split: Any, column: str) -> Sequence[str] | None:
    """A ClassLabel's names; None where there is none, or where its names only repeat the numbers."""
    names = getattr(_feature(split, column), "names", None)
    return None if names is None or list(names) == [str(i) for i in range(len(names))] else names


def _distinct(splits: Sequence[Any], column: str) -> tuple[str, ...]:
    """The values of all training rows as names: numbers by size, other values by their text.

    Of rows that were cut into training and test rows by chance, those of all.
    """
    those = splits if isinstance(splits, source.Splits) and splits.cut else splits[:1]
    values = [value for split in those for value in split[column] if not source.is_missing(value)]
    _check(values, column, "task.label", "training")
    names = {value_name(value) for value in values}
    return tuple(sorted(names, key=lambda n: (Decimal(n), n)) if all(map(is_number, names)) else sorted(names))


def _check(values: Sequence[Any], column: str, key: str, what: str) -> None:
    """``ValueError`` where a value is missing, or is neither a number nor a text."""
    wrong = [value for value in values if not _is_label(value)]
    missing = sum(map(source.is_missing, wrong))
    if missing:
        raise ValueError(
            f"column {column!r} ({key}) has {missing} missing values in the {what} rows; fill or drop them."
        )
    if wrong:
        raise ValueError(
            f"column {column!r} ({key}) holds {wrong[0]!r} in the {what} rows; a label is one number or string."
        )


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
