"""Class labels: the rule by which a value of a column is a class. Names decide, so that all clients agree."""

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
from fedlora.tasks.data.rows import Splits, check_column, is_missing, read_column

NAME, POSITION = "name", "position"
READINGS = ("", NAME, POSITION)  # how a column's values are matched with classes; "": they are no classes
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
MOST = 10  # values or names that a message lists


class Targets(NamedTuple):
    """The targets of the training and the test rows."""

    train: Tensor  # (N,) int64, or float32 for a regression
    test: Tensor
    names: tuple[str, ...]  # of the head's outputs
    notes: tuple[str, ...] = ()
    reading: str = ""  # one of READINGS


@dataclass(frozen=True)
class Classes:
    """The classes of a task: their names in the order of the head's outputs, and how values are matched with them.

    A text, a ``ClassLabel`` and a boolean are matched by name. A number is matched by name if some names are numbers;
    otherwise it is a position among ``names``, provided that their order is known.
    """

    names: tuple[str, ...]
    ordered: bool  # whether task.label_names or the data itself gives the order
    subset: tuple[int, ...] = ()  # the classes that task.labels keeps, in order; empty: all
    key: str = "task.label"  # the setting that names the column

    @classmethod
    def of(
        cls, splits: Sequence[Any], column: str, given: Sequence[str] | None, keep: Collection[Any] | None
    ) -> "Classes":
        """Return the classes: the ``given`` names, those of a ``ClassLabel``, or the training rows' distinct values.

        ``splits`` are the training and test splits with all rows, so that no random draw changes the classes. Raises
        ``ValueError`` if there are fewer than two classes, or if ``keep`` has an unknown one.
        """
        names = tuple(given or _declared_names(splits[0], column) or ())
        ordered = bool(names)
        if not ordered:
            # Rows that were split at random into training and test rows count together.
            source = splits if isinstance(splits, Splits) and splits.cut else splits[:1]
            values = [value for split in source for value in split[column] if not is_missing(value)]
            _check_values(values, column, "task.label", "training")
            distinct = {value_name(value) for value in values}
            numeric = all(map(is_number, distinct))
            names = tuple(sorted(distinct, key=lambda n: (Decimal(n), n)) if numeric else sorted(distinct))
        if len(names) < 2:
            raise ValueError(f"column {column!r} holds only {len(names)} label; a classification needs at least 2.")
        return cls(names, ordered).keep(keep)

    def keep(self, values: Collection[Any] | None) -> "Classes":
        """Return the classes reduced to those of ``task.labels``, given by name or as in the rows."""
        if values is None:
            return self
        numbers = set()
        for value in values:
            number = self.find(value)
            if number is None:
                raise ValueError(f"task.labels has {value!r}, which is no label; labels are {join_values(self.names)}.")
            numbers.add(number)
        if len(numbers) < 2:
            raise ValueError(f"task.labels keeps only {len(numbers)} label; a classification needs at least 2.")
        return Classes(self.names, self.ordered, tuple(sorted(numbers)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the head's outputs."""
        return tuple(self.names[i] for i in self.subset) if self.subset else self.names

    @cached_property
    def _by_name(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _by_number(self) -> Mapping[Decimal, list[int]]:
        """The classes with numbers for names."""
        classes: dict[Decimal, list[int]] = {}
        for i, name in enumerate(self.names):
            if is_number(name):
                classes.setdefault(Decimal(name), []).append(i)
        return classes

    def find(self, value: Any, label_names: Sequence[str] | None = None) -> int | None:
        """Return the class of a value, or None; ``label_names`` are the names of the column's ``ClassLabel``."""
        if label_names is not None:
            value = label_names[value] if 0 <= value < len(label_names) else None
        if isinstance(value, str):
            return self._by_name.get(value)
        if isinstance(value, bool):
            alike = [i for i, name in enumerate(self.names) if name.casefold() == str(value).casefold()]
            return alike[0] if len(alike) == 1 else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        if not self._by_number:
            fits = self.ordered and float(value).is_integer() and 0 <= value < len(self.names)
            return int(value) if fits else None
        several = self._by_number.get(Decimal(value_name(value)), [])
        if len(several) > 1:
            raise ValueError(
                f"the label {value_name(value)} is {self.names[several[0]]!r} as well as {self.names[several[1]]!r} in "
                "task.label_names; write labels as text in the data, or rename one of them."
            )
        return several[0] if several else None

    def reading(self, split: Any, column: str) -> str:
        """Return ``NAME`` or ``POSITION``: how this split's values are matched."""
        if self._by_number or _label_names(split, column) is not None:
            return NAME
        numeric = any(isinstance(value, int | float) and not isinstance(value, bool) for value in split[column])
        return POSITION if numeric else NAME

    def values(self, split: Any, column: str) -> set[Any] | None:
        """Return the values of a split whose rows are kept; None: all."""
        if not self.subset:
            return None
        label_names, distinct = _label_names(split, column), set(read_column(split, column, self.key))
        return {value for value in distinct if _is_label(value) and self.find(value, label_names) in self.subset}

    def targets(self, train: Any, test: Any, column: str) -> Targets:
        """Return both splits' classes, and notes on how the values were read."""
        parts = (train, "training"), (test, "test")
        train_labels, test_labels = (self.of_rows(split, column, role) for split, role in parts)
        notes = [note for split, role in parts for note in self.notes(split, column, role)]
        by_position = POSITION in (self.reading(train, column), self.reading(test, column))
        return Targets(train_labels, test_labels, self.outputs, tuple(notes), POSITION if by_position else NAME)

    def of_rows(self, split: Any, column: str, role: str) -> Tensor:
        """Return each row's class (N,), int64, as an index into ``outputs``; unknown values are a ``ValueError``."""
        values, label_names = read_column(split, column, self.key), _label_names(split, column)
        _check_values(values, column, self.key, role)
        places: dict[int | None, int] = {i: place for place, i in enumerate(self.subset or range(len(self.names)))}
        classes = {value: self.find(value, label_names) for value in dict.fromkeys(values)}
        strange = [value for value, i in classes.items() if i not in places]
        if strange:
            raise ValueError(self._explain_strange(strange, label_names, column, role))
        return torch.tensor([places[classes[value]] for value in values], dtype=torch.int64)

    def _explain_strange(self, strange: Sequence[Any], names: Sequence[str] | None, column: str, role: str) -> str:
        values = [names[v] if names is not None and 0 <= v < len(names) else v for v in strange]
        texts = [v for v in values if isinstance(v, str)]
        near = nearest(texts[0], self.names) if texts else None
        hint = f"; did you mean {near!r}?" if near else ""
        if not self.ordered:
            known = f"the training rows have {join_values(self.names)}"
        elif texts or self._by_number:
            known = f"the labels are {join_values(self.names)}"
        else:
            known = f"no label name is a number, so that numbers are positions, {describe_positions(self.names)}"
        which = "which matches no label" if len(values) == 1 else "which match no label"
        return (
            f"column {column!r} ({self.key}) holds {join_values(values)} in the {role} rows, {which}{hint}; {known}; "
            "correct the rows, or set task.label_names to all labels in their order."
        )

    def notes(self, split: Any, column: str, role: str) -> list[str]:
        """Return a note if numbers are read as positions, or if they are names of classes without an order."""
        if self.reading(split, column) == POSITION:
            return [
                f"the labels of column {column!r} in the {role} rows are numbers, and none of the label names is one: "
                f"they are read as positions, {describe_positions(self.names)}."
            ]
        counted = self.names == tuple(map(str, range(len(self.names))))
        if role == "training" and not self.ordered and self._by_number and not counted:
            return [
                f"the labels of column {column!r} are numbers: {join_values(self.names)}; they are {len(self.names)} "
                "classes, named by their values."
            ]
        return []


def label_map(names: Sequence[str], outputs: Collection[str], reading: str) -> dict[str, str]:
    """Return the class name of each value under a reading, as a record in the run: value -> name."""
    pairs = ((str(i) if reading == POSITION else name, name) for i, name in enumerate(names))
    return {value: name for value, name in pairs if name in outputs}


def describe_positions(names: Sequence[str]) -> str:
    """Return ``0 = first name, 1 = second name, ...``."""
    return join_values([f"{i} = {name}" for i, name in enumerate(names)], quoted=False)


def check_names(names: Sequence[str] | None) -> None:
    """Raise ``ValueError`` if a label name occurs twice."""
    twice = [name for name, count in Counter(names or ()).items() if count > 1]
    if twice:
        raise ValueError(f"task.label_names has {twice[0]!r} twice; each label has one name, so rename or drop one.")


def is_number(name: str) -> bool:
    """Whether a name is written as a number."""
    return NUMBER.fullmatch(name) is not None


def value_name(value: Any) -> str:
    """Return a value as the name of a class: 3 and 3.0 are "3"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def join_values(values: Sequence[Any], quoted: bool = True) -> str:
    """Return values as a list for a message, texts in quotes; of many values, the first and the last."""
    texts = [repr(v) if quoted and isinstance(v, str) and not is_number(v) else str(v) for v in values]
    if len(texts) > MOST:
        texts = [*texts[: MOST - 2], "...", texts[-1]]
    return ", ".join(texts)


def _declared_names(split: Any, column: str) -> Sequence[str] | None:
    check_column(split, column, "task.label")
    return getattr(split.features[column], "names", None)


def _label_names(split: Any, column: str) -> Sequence[str] | None:
    """Return a ``ClassLabel``'s names; None if there is none, or if its names only repeat the numbers."""
    names = _declared_names(split, column)
    return None if names is None or list(names) == [str(i) for i in range(len(names))] else names


def _check_values(values: Sequence[Any], column: str, key: str, role: str) -> None:
    """Raise ``ValueError`` if a value is neither a number nor a text; missing values were checked before."""
    odd = [value for value in values if not _is_label(value)]
    if odd:
        raise ValueError(f"column {column!r} ({key}) holds {odd[0]!r} in the {role} rows; a label is a number or text.")


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
