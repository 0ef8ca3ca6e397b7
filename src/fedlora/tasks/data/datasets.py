"""Datasets of the caller: any objects with a length and an item for each index, such as torch's and Hugging Face's.

Their rows can be anything. What is read of them here are labels, for partitions, and digests, so that a run that is
resumed with other rows is refused.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LABELS = ("labels", "label")  # usual keys and columns of a row's label
CLASSES = 1000  # more different labels than these are numbers, not classes
WHOLE = 20_000  # rows; of a larger dataset, so many are digested, evenly spaced
TWICE = 8  # rows that are read twice, to see whether reading them is random
SIZE = 16  # bytes of a digest


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of one dataset: ``labels`` (N,) int64, and ``digests`` (N, 16) uint8.

    Each is None if the rows have none. ``reasons`` say why contents are not digested.
    """

    count: int
    labels: Tensor | None
    digests: Tensor | None
    names: tuple[str, ...] = ()  # of the labels, if the dataset has any
    reasons: tuple[str, ...] = ()


def is_one_each(value: Any) -> bool:
    """Whether a value is a list of datasets, one for each client, and not a list of rows."""
    if not isinstance(value, list | tuple) or not value:
        return False
    first = value[0]
    is_row = isinstance(first, Mapping | tuple | str | bytes | Tensor) or hasattr(first, "dtype")
    return not is_row and (hasattr(first, "__getitem__") or hasattr(first, "__iter__"))


def check_dataset(dataset: Any, key: str) -> int:
    """Return a dataset's number of rows. Raises ``ValueError`` if it is no dataset, or is empty."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping | str | bytes):
        raise ValueError(
            f"{key} is a {kind}, which is no dataset; give an object with a length and an item for each index, such as "
            "a torch or a Hugging Face Dataset."
        )
    try:
        rows = len(dataset)
    except TypeError as error:
        raise ValueError(
            f"{key} is a {kind}, which has no length; clients draw their rows by number, so give a dataset with a "
            "length and an item for each index (for a stream, a list of its rows)."
        ) from error
    if not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{key} is a {kind}, whose items have no index; give a dataset with an item for each index.")
    if rows == 0:
        raise ValueError(f"{key} has no rows; leave it out, or give it some.")
    return rows


def read_rows(dataset: Any) -> Rows:
    """Read a dataset once: every row's label, and a digest of its content."""
    count, labels = len(dataset), _labels_at_hand(dataset)
    sample = range(count) if count <= WHOLE or labels is None else range(0, count, -(-count // WHOLE))
    digests, each, reasons = torch.zeros(count, SIZE, dtype=torch.uint8), [], set()
    for row in sample:
        value = dataset[row]
        digest, unknown = digest_value(value)
        digests[row] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        each.append(_label_of(value))
        reasons |= {f"a {kind}, which cannot be digested" for kind in unknown}
    if labels is None and None not in each:
        labels = torch.tensor(each, dtype=torch.int64)
    places = range(0, count, -(-count // TWICE))
    if any(bytes(digests[row].tolist()) != digest_value(dataset[row])[0] for row in places if row in sample):
        return Rows(count, labels, None, _label_names(dataset), ("other values each time they are read",))
    return Rows(count, labels, digests, _label_names(dataset), tuple(sorted(reasons)))


def read_values(dataset: Any, column: str, key: str) -> list[str]:
    """Return a column's values as texts. Raises ``ValueError`` if the rows have no such column."""
    try:
        if column in (getattr(dataset, "column_names", None) or ()):
            return [str(value) for value in dataset[column]]
        return [str(dataset[row][column]) for row in range(len(dataset))]
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"clients.partition names the column {column!r}, which the rows of {key} do not have; give rows that are "
            "mappings with this key, or another partition."
        ) from error


def _labels_at_hand(dataset: Any) -> Tensor | None:
    """Return the labels that can be had without reading rows: of a column, ``targets`` or a tensor; None if none."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list):
        column = next((name for name in LABELS if name in columns), None)
        return None if column is None else _to_labels(list(dataset[column]))
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return _to_labels(dataset.tensors[1]) if len(dataset.tensors) > 1 else None
    if isinstance(dataset, torch.utils.data.Subset):
        labels = _labels_at_hand(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    values = getattr(dataset, "targets", None)
    return _to_labels(values) if isinstance(values, Sequence | Tensor) and len(values) == len(dataset) else None


def _to_labels(values: Any) -> Tensor | None:
    """Return integers (N,), or None if the values are anything else."""
    try:
        x = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if x.dim() != 1 or x.is_floating_point() or x.is_complex() else x.long()


def _label_of(row: Any) -> int | None:
    """Return a row's label: of a usual key, or the second of a tuple; None if that is no integer."""
    if isinstance(row, Mapping):
        value = next((row[name] for name in LABELS if name in row), None)
    else:
        value = row[1] if isinstance(row, tuple | list) and len(row) > 1 else None
    if isinstance(value, bool | int):
        return int(value)
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")  # a tensor or a NumPy number
    number = value.item() if is_scalar and value is not None else None
    return int(number) if isinstance(number, bool | int) else None


def _label_names(dataset: Any) -> tuple[str, ...]:
    features = getattr(dataset, "features", None)
    for name in LABELS if isinstance(features, Mapping) else ():
        if names := getattr(features.get(name), "names", None):
            return tuple(map(str, names))
    return ()


def digest_value(value: Any) -> tuple[bytes, set[str]]:
    """Return a digest of tensors, arrays, images, numbers and texts, at any depth, and the kinds of other values."""
    unknown: set[str] = set()
    hasher = hashlib.blake2b(digest_size=SIZE)
    for part in _content(value, unknown):
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest(), unknown


def _content(value: Any, unknown: set[str]) -> Iterator[bytes]:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _content(value[key], unknown)
    elif isinstance(value, tuple | list):
        yield f"sequence {len(value)}".encode()
        for part in value:
            yield from _content(part, unknown)
    elif isinstance(value, Tensor) and value.layout == torch.strided:
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tobytes") and not getattr(getattr(value, "dtype", None), "hasobject", False):
        kind = getattr(value, "dtype", None) or getattr(value, "mode", "")  # an array, or an image
        yield f"array {kind} {getattr(value, 'shape', getattr(value, 'size', ''))}".encode()
        yield value.tobytes()
    else:
        unknown.add(type(value).__name__)
        yield type(value).__name__.encode()
