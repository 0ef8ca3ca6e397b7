"""Tables as values: columns with units, rows of plain values, and how a value is written."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
DASH = "–"


@dataclass(frozen=True)
class Column:
    """One column. ``title`` says the unit where there is one; ``digits`` None is for text."""

    key: str
    title: str
    digits: int | None = None
    spread: str | None = None  # the key of the standard deviation that is shown beside it


@dataclass(frozen=True)
class Table:
    """Rows of plain values (text, numbers, None), each a mapping of the columns' keys."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    note: str = ""  # what its figures are, in a sentence

    def text(self, row: Mapping[str, Any], column: Column) -> str:
        """One cell as a reader sees it."""
        value = row.get(column.key)
        if value is None or value == "":
            return DASH
        if column.digits is None or isinstance(value, str):
            return str(value)
        if 0 < value < 0.5 * 10**-column.digits:
            return f"<{10**-column.digits:.{column.digits}f}"  # small is not nothing
        deviation = row.get(column.spread) if column.spread else None
        beside = f" ± {deviation:.{column.digits}f}" if deviation else ""
        return f"{value:,.{column.digits}f}{beside}" if math.isfinite(value) else DASH


@dataclass(frozen=True)
class Over:
    """A figure over seeds: its mean, the sample standard deviation (0 of one), and of how many."""

    mean: float
    std: float
    n: int


def over(values: Iterable[float | None]) -> Over | None:
    """Mean and deviation of what is there; None where nothing is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Over(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else 0.0, len(there))


def grouped(rows: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Rows by key, in the order in which keys are first met."""
    found: dict[K, list[V]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def thinned(rows: Sequence[dict[str, Any]], line: Sequence[str], most: int, x: str = "round") -> list[dict[str, Any]]:
    """At most about ``most`` rows: along each line (rows alike in ``line``) neighbours become their mean.

    Every line keeps its last row as it is; texts are the last one's of their stretch.
    """
    width = math.ceil(len(rows) / most)
    if width <= 1:
        return list(rows)
    found = []
    for own in grouped(rows, lambda row: tuple(row[key] for key in line)).values():
        own = sorted(own, key=lambda row: row[x])
        whole = [own[i : i + width] for i in range(0, len(own) - 1, width)]
        found += [_mean(few[:width]) for few in whole if few] + [own[-1]]
    return found


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    means = {key: over(row[key] for row in rows) for key in numbers}
    return {**rows[-1], **{key: found.mean for key, found in means.items() if found is not None}}
