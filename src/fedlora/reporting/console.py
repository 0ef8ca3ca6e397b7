"""Where tables go: a console that obeys nothing in what it shows, and that a narrow terminal and a pipe can read."""

import sys
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fedlora.text import shown

WIDE = 200  # characters of a line where nobody looks: a folded table cannot be read by a program


class Plain(Console):
    """A console that obeys nothing in the texts it shows: names may come from other parties."""

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as it is, without rich's markup, and with escapes where a terminal would act on a character."""
        lines = (shown(line, len(line)) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **{**options, "markup": False})

    def print(self, *things: Any, **options: Any) -> None:
        """A table that is wider than the terminal is printed as a list of its rows: no figure is cut off."""
        super().print(*(self._fitting(thing) for thing in things), **options)

    def _fitting(self, thing: Any) -> Any:
        """Below its least width, rich would cut or break what should stay in one piece."""
        if not isinstance(thing, Table):
            return thing
        need = self.measure(thing, options=self.options.update(max_width=10_000)).minimum
        return thing if need <= self.width else listed(self, thing)


def listed(console: Console, table: Table) -> Group:
    """The rows one after the other, each cell on a line with its heading before it."""
    titles = [_text(console, column.header) for column in table.columns]
    lines = [] if table.title is None else [_text(console, str(table.title))]
    for row in zip(*([_text(console, cell) for cell in column.cells] for column in table.columns)):
        if table.show_header:
            lines += [
                f"{title}: {cell}" if i == 0 else f"  {title}: {cell}"
                for i, (title, cell) in enumerate(zip(titles, row))
            ]
        else:
            lines.append(": ".join(row))
    return Group(*(Text(line, overflow="fold") for line in lines))


def _text(console: Console, what: Any) -> str:
    return what.plain if isinstance(what, Text) else console.render_str(str(what)).plain


def stdout() -> Console:
    """Where tables go."""
    console = Plain()
    return console if console.is_terminal else Plain(width=WIDE, file=sys.stdout)


def printed(*things: Table | str) -> None:
    """Tables and lines on stdout, one after the other."""
    console = stdout()
    for thing in things:
        console.print(thing)
