"""Rows from wherever they lie: a hub id, a folder, a file, or the digits that come with scikit-learn."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.nearest import nearest
from fedlora.seeds import derived

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}
HELD_OUT = 0.2  # of a single file's rows, when it has no test split of its own
DIGITS = "digits"
ONLY = "all"  # the split of data that comes without any
TEST = "test"  # what the test split is called where nothing else is said
OF, ANY = " * ", ""  # in the name of a test split: a share of the training rows; no test rows at all


class Splits(tuple[Any, ...]):
    """The training split and the test splits, as ``datasets.Dataset``s."""

    cut = False  # whether they were cut from the same rows, so that it is chance which of them has a row


def splits(data: str, config: str | None, train: str, tests: Sequence[str], seed: int) -> Splits:
    """The training and the test splits as ``datasets.Dataset``s; data that is one split is cut in two by the seed.

    A test split that ``held_out`` named is a seeded share of the training rows: no other split is read.
    """
    name, marked, share = tests[0].rpartition(OF)
    if marked and name == train:
        rows, _ = splits(data, config, train, [ANY], seed)
        return _cut(rows, _share(share, len(rows)), derived(seed, "validation rows"))
    found = _load(data, config)
    if train not in tests and (set(found) == {ONLY} or (set(found) == {train} and tuple(tests) == (TEST,))):
        (rows,) = found.values()
        if len(rows) < 2:
            raise ValueError(f"{data!r} holds {len(rows)} row; it is cut into training and test rows and needs 2.")
        return _cut(rows, HELD_OUT, derived(seed, "held out"))
    pairs = [("train_split", train), *(("test_split", train if test == ANY else test) for test in tests)]
    for key, split in pairs:
        if split not in found:
            raise ValueError(f"{data!r} has no split {split!r}; set task.{key} to one of {', '.join(sorted(found))}.")
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


def split_names(data: str, config: str | None) -> list[str]:
    """The splits that there are; none of a folder's files is read for it."""
    return sorted(_load(data, config))


class _Files(Mapping[str, Any]):
    """A folder's splits, each read when it is asked for: who wants two of them is not kept from it by a third."""

    def __init__(self, files: Mapping[str, Path]):
        self.files = files

    def __getitem__(self, split: str) -> Any:
        return _read(self.files[split])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _load(data: str, config: str | None) -> Mapping[str, Any]:
    import datasets
    from huggingface_hub.utils import logging as hub

    datasets.disable_progress_bars()
    hub.set_verbosity_error()  # its retries would be said six times before our one sentence
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # and a broken file's errors before ours
    path = Path(data).expanduser()
    if data == DIGITS:
        return _digits()
    try:
        if path.is_file():
            return {ONLY: _read(path)}
        if path.is_dir():
            return _folder(path, config)
        if data.startswith((".", "/", "~")) or any(data.endswith(ending) for ending in READERS):
            raise ValueError(f"there is no data at {data!r}; name a file, a folder, a hub id, or 'digits'.")
        return dict(datasets.load_dataset(data, config))
    except (OSError, datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"the data {data!r} could not be read: {_reason(error)}; name a file, a folder or a hub id."
        ) from error


def _folder(path: Path, config: str | None) -> Mapping[str, Any]:
    import datasets

    if (path / "dataset_dict.json").exists():
        return dict(datasets.load_from_disk(str(path)))
    if (path / "dataset_info.json").exists():
        return {ONLY: datasets.load_from_disk(str(path))}
    files = {f.name.split(".", 1)[0]: f for f in sorted(path.iterdir()) if _ending(f) and f.name != "meta.json"}
    if files:
        return _Files(files)
    if any(path.glob("*/*.parquet")):  # a copy of a hub's data repository
        return dict(datasets.load_dataset(str(path), config))
    if any(p.is_dir() for p in path.iterdir()):
        return dict(datasets.load_dataset("imagefolder", data_dir=str(path)))
    raise ValueError(f"the folder {str(path)!r} holds no data; it needs train and test files ({', '.join(READERS)}).")


def _ending(file: Path) -> str | None:
    return next((e for e in sorted(READERS, key=len, reverse=True) if file.name.endswith(e)), None)


def _read(file: Path) -> Any:
    import datasets

    ending = _ending(file)
    if ending is None:
        raise ValueError(f"{str(file)!r} is of no kind that can be read; the kinds are {', '.join(READERS)}.")
    if file.stat().st_size == 0:
        raise ValueError(f"the file {str(file)!r} is empty; it needs rows.")
    # A cache of its own for each run: two processes may read one file, and nothing is left in the home folder.
    try:
        return datasets.load_dataset(READERS[ending], data_files=str(file), split="train", keep_in_memory=True)
    except (OSError, ValueError, TypeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{str(file)!r} could not be read as {READERS[ending]}: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """The first line of what began it: the outer errors only say that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else "it holds no rows"


@cache
def _digits() -> Mapping[str, Any]:
    import datasets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype("uint8")
    halves = train_test_split(range(len(pixels)), test_size=0.25, random_state=0, stratify=found.target)
    return {
        split: datasets.Dataset.from_dict(
            {"image": [pixels[i].tobytes() for i in rows], "label": [int(found.target[i]) for i in rows]}
        )
        for split, rows in zip(("train", "test"), halves)
    }


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
        raise ValueError(
            f"the data has no column {name!r} ({key}); {hint} columns are {', '.join(split.column_names)}."
        )


def column(split: Any, name: str, key: str) -> list[Any]:
    """A column's values. ``ValueError`` names the nearest column and the values that are missing."""
    present(split, name, key)
    values = list(split[name])
    gaps = sum(value is None for value in values)
    if gaps:
        raise ValueError(f"column {name!r} ({key}) has {gaps} missing values in {len(values)} rows; fill or drop them.")
    return values


def named(split: Any, name: str, key: str) -> list[Any]:
    """A column's values, a ``ClassLabel``'s by its own names."""
    values, names = column(split, name, key), getattr(split.features[name], "names", None)
    if names is None:
        return values
    odd = next((value for value in values if not 0 <= value < len(names)), None)
    if odd is not None:
        raise ValueError(f"column {name!r} ({key}) holds {odd}, but it has {len(names)} label names; fill or drop it.")
    return [names[value] for value in values]


def numbers(split: Any, name: str, what: str) -> Tensor:
    """A column of numbers, float32."""
    values = column(split, name, "task.label")
    odd = next((v for v in values if isinstance(v, bool) or not isinstance(v, int | float)), None)
    odd = next((v for v in values if not math.isfinite(v)), None) if odd is None else odd
    if odd is not None:
        raise ValueError(
            f"column {name!r} (task.label) holds {odd!r} in the {what} rows; a regression needs a number in each."
        )
    return torch.tensor(values, dtype=torch.float32)


def subset(split: Any, rows: int | None, keep: Collection[Any] | None, label: str, seed: int, what: str) -> Any:
    """The split cut to the rows whose label is one of ``keep``, and to a seeded draw of so many rows."""
    if keep is not None:
        values = column(split, label, "task.label")
        split = split.select([i for i, value in enumerate(values) if value in keep])
    if rows is not None and rows < len(split):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derived(seed, "rows", what)))
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
    return tuple(map(str, named(split, name, "clients.split.column")))
