"""Splits, columns and checks of rows, from any source of ``sources``."""

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
from fedlora.tasks.data.sources import DIGITS, ONLY, load_data
from fedlora.tasks.data.tables import TextFormat

HELD_OUT = 0.2  # of a single file's rows, if it has no test split
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
LARGEST = 3.4e38  # of float32
OF, ANY = " * ", ""  # in the name of a test split: a share of the training rows; no test rows at all


class Splits(tuple[Any, ...]):
    """The training split and the test splits, as ``datasets.Dataset``s."""

    cut = False  # whether they were split at random from the same rows


def text_format(task: Any) -> TextFormat:
    """Return the encoding and delimiter of a task's text files. Raises ``ValueError`` if one is unknown."""
    return TextFormat(getattr(task, "encoding", None), getattr(task, "delimiter", None))


def load_splits(
    data: str, config: str | None, train: str, tests: Sequence[str], seed: int, form: TextFormat | None = None
) -> Splits:
    """Return the training and the test splits. Data with a single split is cut in two at random, by the seed.

    A test split from ``held_out_split`` is a random share of the training rows: no other split is read.
    """
    name, marked, share = tests[0].rpartition(OF)
    if marked and name == train:
        rows, _ = load_splits(data, config, train, [ANY], seed, form)
        return _halve(rows, _parse_share(share, len(rows)), derive_seed(seed, "validation rows"))
    splits = load_data(data, config, form or TextFormat())
    if train not in tests and (set(splits) == {ONLY} or (set(splits) == {train} and tuple(tests) == ("test",))):
        (rows,) = splits.values()
        if len(rows) < 2:
            raise ValueError(f"{data!r} holds {len(rows)} row; it is cut into training and test rows and needs 2.")
        return _halve(rows, HELD_OUT, derive_seed(seed, "held out"))
    for key, split in [("train_split", train), *(("test_split", test) for test in tests if test != ANY)]:
        if split not in splits:
            raise ValueError(f"{data!r} has no split {split!r}; set task.{key} to one of: {', '.join(sorted(splits))}.")
    return Splits((splits[train], *(None if test == ANY else splits[test] for test in tests)))


def concatenate(tests: Sequence[Any]) -> tuple[Any, Tensor | None]:
    """Return several test splits as one, and each row's split; None for a single split."""
    import datasets

    if len(tests) == 1:
        return tests[0], None
    sizes = torch.tensor([len(test) for test in tests])
    return datasets.concatenate_datasets(list(tests)), torch.arange(len(tests)).repeat_interleave(sizes)


def _halve(rows: Any, share: float, seed: int) -> Splits:
    halves = rows.train_test_split(share, seed=seed % 2**32)
    splits = Splits((halves["train"], halves["test"]))
    splits.cut = True
    return splits


def _parse_share(text: str, rows: int) -> float:
    """Return the share at the end of a test split's name. Raises ``ValueError`` if it leaves no rows on one side."""
    try:
        share = float(text)
    except ValueError as error:
        raise ValueError(f"task.test_split ends with {text!r}; a share of the rows is a number, e.g. 0.1.") from error
    if not 0 < share < 1 or rows * share < 1 or rows * (1 - share) < 1:
        raise ValueError(f"{text} of {rows} training rows cannot be held out; take a share from 0 to 1, or more rows.")
    return share


def held_out_split(train: str, share: float) -> str:
    """Return the name of a test split that is a random share of the training split, taken out of it."""
    return f"{train}{OF}{share}"


def image_shape(data: str) -> tuple[int, ...] | None:
    """Return the height, width and channels of raw bytes, if the data has them."""
    if data == DIGITS:
        return (8, 8, 1)
    meta = Path(data).expanduser() / "meta.json"
    shape = json.loads(meta.read_text(encoding="utf-8")).get("image_shape") if meta.is_file() else None
    return tuple(shape) if shape else None


def check_column(split: Any, name: str, key: str) -> None:
    """Raise ``ValueError`` if there is no such column; ``key`` is the setting that names it."""
    if name not in split.column_names:
        near = nearest(name, split.column_names)
        hint = f"did you mean {near!r}? Its" if near else "its"
        single = len(split.column_names) == 1
        more = "; if a CSV file's columns are separated by another character, set task.delimiter" if single else ""
        known = ", ".join(split.column_names)
        raise ValueError(f"the data has no column {name!r} ({key}); {hint} columns are {known}{more}.")


def is_missing(value: Any) -> bool:
    """Whether a value is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_column(split: Any, name: str, key: str, allow_missing: bool = False) -> list[Any]:
    """Return a column's values. Raises ``ValueError`` if there is no such column, or if values are missing."""
    check_column(split, name, key)
    values = list(split[name])
    gaps = 0 if allow_missing else sum(map(is_missing, values))
    if gaps:
        raise ValueError(f"column {name!r} ({key}) has {gaps} missing values in {len(values)} rows; fill or drop them.")
    return values


def read_named_column(split: Any, name: str, key: str, allow_missing: bool = False) -> list[Any]:
    """Return a column's values, with the label names in place of the numbers of a ``ClassLabel``."""
    values = read_column(split, name, key, allow_missing)
    names = getattr(split.features[name], "names", None)
    if names is None:
        return values
    odd = next((value for value in values if not is_missing(value) and not 0 <= value < len(names)), None)
    if odd is not None:
        raise ValueError(f"column {name!r} ({key}) holds {odd}, but it has {len(names)} label names; fill or drop it.")
    return [value if is_missing(value) else names[value] for value in values]


def read_numbers(split: Any, name: str, role: str) -> Tensor:
    """Return a column of numbers, float32. Text that is a number counts, because CSV files have only text."""
    values = read_column(split, name, "task.label")
    numbers = torch.tensor([_to_float(value) for value in values], dtype=torch.float32)
    odd = (~numbers.isfinite()).nonzero()
    if len(odd):
        raise ValueError(
            f"column {name!r} (task.label) holds {values[int(odd[0])]!r} in the {role} rows; "
            "a regression needs a number in each."
        )
    return numbers


def _to_float(value: Any) -> float:
    """Return a value as a number, or NaN if it is none."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value.strip()) else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
        return math.nan
    return float(value)


def draw_rows(split: Any, rows: int | None, keep: Collection[Any] | None, label: str, seed: int, role: str) -> Any:
    """Return the rows with a label of ``keep``, and of these a random draw of ``rows``; None: all."""
    if keep is not None:
        values = read_column(split, label, "task.label")
        split = split.select([i for i, value in enumerate(values) if value in keep])
    if rows is not None and rows < len(split):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(seed, "rows", role)))
        split = split.select(sorted(order[:rows].tolist()))
    if len(split) == 0:
        reason = "" if keep is None else " with the labels of task.labels"
        raise ValueError(f"the {role} split has no rows{reason}; it needs some.")
    return split


def client_groups(split: Any, name: str | None, role: str) -> tuple[str, ...] | None:
    """Return each row's value of the natural client column, which the test split need not have."""
    if name is None or (role == "test" and name not in split.column_names):
        return None
    return tuple(map(str, read_named_column(split, name, "clients.partition.column")))
