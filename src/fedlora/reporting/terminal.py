"""Tables on stdout, readable on a narrow terminal and in a pipe; texts of other clients cannot control it."""

import sys
from typing import Any

import rich.table
from rich.console import Console, Group
from rich.text import Text

from fedlora.runs.table import Table
from fedlora.text import display_safe

WIDE = 200  # characters of a line outside a terminal: a program cannot read a folded table


class PlainConsole(Console):
    """A console without markup and control characters, since names may come from other clients."""

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text without rich's markup, and with control characters escaped."""
        return super().render_str(_safe(text), **{**options, "markup": False})

    def print(self, *things: Any, **options: Any) -> None:
        """Print tables and text; a table that is wider than the terminal becomes a list of its rows."""
        super().print(*(self._fit(thing) if isinstance(thing, Table) else thing for thing in things), **options)

    def _fit(self, table: Table) -> rich.table.Table | Group:
        """Build a grid, or a list if the terminal is so narrow that rich would truncate or break words."""
        grid = build_grid(table)
        need = self.measure(grid, options=self.options.update(max_width=10_000)).minimum
        return grid if need <= self.width else build_list(table)


def build_grid(table: Table) -> rich.table.Table:
    """Convert the table for rich."""
    grid = rich.table.Table(title=table.title, show_header=table.has_header)
    for column in table.columns:
        grid.add_column(column.title, justify=column.alignment, overflow="fold")
    for place, row in enumerate(table.rows):
        if place in table.rules:
            grid.add_section()
        grid.add_row(*(column.text(row) for column in table.columns))
    return grid


def build_list(table: Table) -> Group:
    """Build a list of the rows, each cell on a line with its title before it."""
    lines = [table.title] if table.title else []
    for row in table.rows:
        cells = [(column.title, column.text(row)) for column in table.columns]
        if table.has_header:
            lines += [f"{'  ' if i else ''}{title}: {cell}" for i, (title, cell) in enumerate(cells)]
        else:
            lines.append(": ".join(cell for _, cell in cells))
    return Group(*(Text(_safe(line), overflow="fold") for line in lines))


def _safe(text: str) -> str:
    return "\n".join(display_safe(line, len(line)) for line in text.split("\n"))


def show(*things: Table | str, whole: tuple[str, ...] = ()) -> None:
    """Print tables and lines on stdout. ``whole`` lines come last and are not wrapped, so they can be copied."""
    console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=WIDE, file=sys.stdout)
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str) and not console.is_terminal)
    for line in whole:
        console.print(line, highlight=False, soft_wrap=True)
