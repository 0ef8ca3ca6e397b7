"""Rows from wherever they lie: a hub id, a folder, a file, or the digits that come with scikit-learn."""

import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.registry import nearest
from fedlora.seeds import derive_seed
from fedlora.tasks.data.sources import DIGITS, ONLY, load
from fedlora.tasks.data.tables import TextFormat

HELD_OUT = 0.2  # of a single file's rows, when it has no test split of its own
AS_IT_SHOWS = TextFormat()
TEST = "test"  # what the test split is called where nothing else is said
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
LARGEST = 3.4e38  # of float32
OF, ANY = " * ", ""  # in the name of a test split: a share of the training rows; no test rows at all


class Splits(tuple[Any, ...]):
    """The training split and the test splits, as ``datasets.Dataset``s."""

    cut = False  # whether they were cut from the same rows, so that it is chance which of them has a row


def text_format(task: Any) -> TextFormat:
    """How a task says that its text files are written. ``ValueError`` where it names no encoding or delimiter."""
    return TextFormat(getattr(task, "encoding", None), getattr(task, "delimiter", None))


def splits(
    data: str, config: str | None, train: str, tests: Sequence[str], seed: int, form: TextFormat = AS_IT_SHOWS
) -> Splits:
    """The training and the test splits as ``datasets.Dataset``s; data that is one split is cut in two by the seed.

    A test split that ``held_out`` named is a seeded share of the training rows: no other split is read.
    """
    name, marked, share = tests[0].rpartition(OF)
    if marked and name == train:
        rows, _ = splits(data, config, train, [ANY], seed, form)
        return _cut(rows, _share(share, len(rows)), derive_seed(seed, "validation rows"))
    found = load(data, config, form)
    if train not in tests and (set(found) == {ONLY} or (set(found) == {train} and tuple(tests) == (TEST,))):
        (rows,) = found.values()
        if len(rows) < 2:
            raise ValueError(f"{data!r} holds {len(rows)} row; it is cut into training and test rows and needs 2.")
        return _cut(rows, HELD_OUT, derive_seed(seed, "held out"))
    pairs = [("train_split", train), *(("test_split", train if test == ANY else test) for test in tests)]
    for key, split in pairs:
        if split not in found:
            raise ValueError(
                f"{data!r} has no split {split!r}; set task.{key} to one of these: {', '.join(sorted(found))}."
            )
    return Splits((found[train], *(None if test == ANY else found[test] for test in tests)))


def joined(tests: Sequence[Any]) -> tuple[Any, Tensor | None]:
    """Several test splits as one, and which of them each row is of; None where there is but one."""
    import datasets

    if len(tests) == 1:
        return tests[0], None
    sizes = torch.tensor([len(test) for test in tests])
    return datasets.concatenate_datasets(list(tests)), torch.arange(len(tests)).repeat_interleave(sizes)


def _cut(rows: Any, share: float, seed: int) -> Splits:
    halves = rows.train_test_split(share, seed=seed % 2**32)
    found = Splits((halves["train"], halves["test"]))
    found.cut = True
    return found


def _share(text: str, rows: int) -> float:
    """The share that a test split's name ends with, where it leaves rows on both sides."""
    try:
        share = float(text)
    except ValueError as error:
        raise ValueError(f"task.test_split ends with {text!r}; a share of the rows is a number, e.g. 0.1.") from error
    if not 0 < share < 1 or rows * share < 1 or rows * (1 - share) < 1:
        raise ValueError(
            f"{text} of {rows} training rows cannot be held out; take a share between 0 and 1, or more rows."
        )
    return share


def held_out(train: str, share: float) -> str:
    """A ``test_split`` that is this share of the training split, drawn by the seed and taken out of it."""
    return f"{train}{OF}{share}"


def split_names(data: str, config: str | None, form: TextFormat = AS_IT_SHOWS) -> list[str]:
    """The splits that there are; none of a folder's files is read for it."""
    return sorted(load(data, config, form))


def image_shape(data: str) -> tuple[int, ...] | None:
    """Height, width and channels of raw bytes, where the data says so itself."""
    if data == DIGITS:
        return (8, 8, 1)
    meta = Path(data).expanduser() / "meta.json"
    found = json.loads(meta.read_text(encoding="utf-8")).get("image_shape") if meta.is_file() else None
    return tuple(found) if found else None


def present(split: Any, name: str, key: str) -> None:
    """``ValueError`` where there is no such column; names the nearest."""
    if name not in split.column_names:
        near = nearest(name, split.column_names)
        hint = f"did you mean {near!r}? Its" if near else "its"
        one = len(split.column_names) == 1
        more = "; if a CSV file's columns are separated by another character, set task.delimiter" if one else ""
        raise ValueError(
            f"the data has no column {name!r} ({key}); {hint} columns are {', '.join(split.column_names)}{more}."
        )


def is_missing(value: Any) -> bool:
    """Whether a row has no value: None, or a number that is none."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cells(split: Any, name: str, key: str) -> list[Any]:
    """A column's values, some of which may be missing. ``ValueError`` names the nearest column."""
    present(split, name, key)
    return list(split[name])


def column(split: Any, name: str, key: str) -> list[Any]:
    """A column's values. ``ValueError`` names the nearest column and the values that are missing."""
    values = cells(split, name, key)
    gaps = sum(is_missing(value) for value in values)
    if gaps:
        raise ValueError(f"column {name!r} ({key}) has {gaps} missing values in {len(values)} rows; fill or drop them.")
    return values


def named(split: Any, name: str, key: str, gaps: bool = False) -> list[Any]:
    """A column's values, a ``ClassLabel``'s by its own names. ``gaps`` lets values be missing."""
    values = cells(split, name, key) if gaps else column(split, name, key)
    names = getattr(split.features[name], "names", None)
    if names is None:
        return values
    odd = next((value for value in values if not is_missing(value) and not 0 <= value < len(names)), None)
    if odd is not None:
        raise ValueError(f"column {name!r} ({key}) holds {odd}, but it has {len(names)} label names; fill or drop it.")
    return [value if is_missing(value) else names[value] for value in values]


def numbers(split: Any, name: str, what: str) -> Tensor:
    """A column of numbers, float32. Text that is a number counts as one: CSV knows nothing else."""
    values = column(split, name, "task.label")
    found = torch.tensor([_number(value) for value in values], dtype=torch.float32)
    odd = (~found.isfinite()).nonzero()
    if len(odd):
        raise ValueError(
            f"column {name!r} (task.label) holds {values[int(odd[0])]!r} in the {what} rows; "
            "a regression needs a number in each."
        )
    return found


def _number(value: Any) -> float:
    """A value as a number; NaN where it is none."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value.strip()) else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
        return math.nan
    return float(value)


def subset(split: Any, rows: int | None, keep: Collection[Any] | None, label: str, seed: int, what: str) -> Any:
    """The split cut to the rows whose label is one of ``keep``, and to a seeded draw of so many rows."""
    if keep is not None:
        values = column(split, label, "task.label")
        split = split.select([i for i, value in enumerate(values) if value in keep])
    if rows is not None and rows < len(split):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(seed, "rows", what)))
        split = split.select(sorted(order[:rows].tolist()))
    if len(split) == 0:
        raise ValueError(
            f"the {what} split has no rows{'' if keep is None else ' with the labels of task.labels'}; it needs some."
        )
    return split


def groups(split: Any, name: str | None, what: str) -> tuple[str, ...] | None:
    """Each row's value of the natural client column; the test split may do without one."""
    if name is None or (what == "test" and name not in split.column_names):
        return None
    return tuple(map(str, named(split, name, "clients.partition.column")))
