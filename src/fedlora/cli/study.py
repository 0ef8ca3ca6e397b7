"""Commands that look into a finished run: similarity."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._options import Json, answer


def similarity(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose clients keep their own factors.")],
    as_json: Json = False,
) -> None:
    """Show how alike the clients' A and B are, weight by weight."""
    from fedlora.reporting import terminal
    from fedlora.reporting.similarity import means
    from fedlora.reporting.similarity import similarity as measure
    from fedlora.reporting.tables.adapters import similarity as tables

    found = measure(folder)
    answer(as_json, {"weights": found, "mean": means(found)}, lambda: terminal.show(*tables(found, means(found))))
