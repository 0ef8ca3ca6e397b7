"""Tables of results, means over seeds, and the HTML of a table; ``fedlora.reporting`` has the other renderers."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

from fedlora.text import display_safe

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
DASH = "–"


@dataclass(frozen=True)
class Column:
    """A column. ``title`` includes the unit; ``digits`` is None for text."""

    key: str
    title: str
    digits: int | None = None
    spread: str | None = None  # the key of the standard deviation, shown beside the figure
    mark: str | None = None  # the key of a text behind the figure
    align: str = ""  # left, right or center; empty: numbers right, text left

    @property
    def alignment(self) -> str:
        """``left``, ``right`` or ``center``."""
        return self.align or ("left" if self.digits is None else "right")

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the text of the cell in a row."""
        value = row.get(self.key)
        if value is None or value == "":
            return DASH
        if self.digits is None or isinstance(value, str):
            return str(value)
        mark = (row.get(self.mark) or "") if self.mark else ""
        if 0 < value < 0.5 * 10**-self.digits:
            return f"<{10**-self.digits:.{self.digits}f}{mark}"  # not 0
        deviation = row.get(self.spread) if self.spread else None
        beside = f" ± {deviation:.{self.digits}f}" if deviation else ""
        return f"{value:,.{self.digits}f}{beside}{mark}" if math.isfinite(value) else DASH


@dataclass(frozen=True)
class Table:
    """Rows of plain values (text, numbers, None), each a mapping from the columns' keys."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    note: str = ""  # explains the figures in a sentence
    has_header: bool = True
    rules: frozenset[int] = frozenset()  # the rows with a line above them


def from_pairs(title: str, rows: Iterable[tuple[str, str]], name: str = "figures") -> Table:
    """Return a table without a header, with a name and a figure in each row."""
    columns = (Column("what", "what"), Column("figure", "figure", align="right"))
    return Table(name, title, columns, [{"what": k, "figure": v} for k, v in rows], has_header=False)


def to_html(
    table: Table, attributes: str = "", is_sortable: bool = False, most: int | None = None, below: Iterable[str] = ()
) -> str:
    """Return the ``<table>``, with its title as caption unless ``attributes`` refer to one.

    ``is_sortable`` puts a button into each heading, ``most`` limits the number of rows, and ``below`` are lines that
    follow the table.
    """
    caption = "" if attributes else f"<caption>{_safe(table.title)}</caption>"
    heads = "".join(_head(column, is_sortable) for column in table.columns)
    head = f"<thead><tr>{heads}</tr></thead>" if table.has_header else ""
    lines = "".join(f"<p>{_safe(line)}</p>" for line in below)
    body = "".join(f"<tr>{_cells(table, row)}</tr>" for row in table.rows[:most])
    return f"<table{attributes and ' '}{attributes}>{caption}{head}<tbody>{body}</tbody></table>{lines}"


def _head(column: Column, is_sortable: bool) -> str:
    kind, title = _kind(column), _safe(column.title)
    inner, order = (f'<button type="button">{title}</button>', ' aria-sort="none"') if is_sortable else (title, "")
    return f'<th scope="col" class="{kind}" data-kind="{kind}"{order}>{inner}</th>'


def _cells(table: Table, row: Mapping[str, Any]) -> str:
    cells = []
    for place, column in enumerate(table.columns):
        value = row.get(column.key)
        data = "" if value is None else _safe(value)
        name, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
        text = _safe(column.text(row))
        cells.append(f'<{name}{scope} class="{_kind(column)}" data-value="{data}">{text}</{name}>')
    return "".join(cells)


def _kind(column: Column) -> str:
    return "text" if column.digits is None else "number"


def _safe(value: object) -> str:
    text = str(value)
    return escape(display_safe(text, len(text)), quote=True)


@dataclass(frozen=True)
class MeanStd:
    """A figure over seeds: its mean, the sample standard deviation (0 of one value), and the number of values."""

    mean: float
    std: float
    n: int


def mean_std(values: Iterable[float | None]) -> MeanStd | None:
    """Return mean and sample standard deviation of the values that are not None; None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return MeanStd(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0, len(known))


def group_by(rows: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Group rows by key, in the order in which keys first occur."""
    groups: dict[K, list[V]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def format_relative(value: float | None) -> str:
    """Format a relative error in scientific notation."""
    return DASH if value is None else f"{value:.2e}"
