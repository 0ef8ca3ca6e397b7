"""Commands that make runs readable for people: report, plots."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._options import Json, answer, say

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or comparisons, finished or not.")]


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="The file; what is there is replaced.")] = Path("report.html"),
) -> None:
    """Write what runs came to as one HTML file that needs no network; several runs are compared."""
    from fedlora.files import write
    from fedlora.reporting.html import page
    from fedlora.reporting.load import runs as read

    text = page(read(runs))
    write(out, text.encode())
    say(f"{out} ({len(text.encode()) / 1e6:.1f} MB): open it in any browser.")


def plots(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="A folder for the files.")],
    width: Annotated[float, typer.Option(help="Of a figure, in millimetres: a paper's column.")] = 84.0,
    as_json: Json = False,
) -> None:
    """Write each figure as SVG, PDF and PNG at a paper's column width, and each table as CSV, Markdown and LaTeX."""
    from fedlora.reporting.files import files
    from fedlora.reporting.load import runs as read

    written, absent = files(read(runs), out, width)
    found = {"files": [str(path) for path in written], "absent": {one.name: one.caption for one in absent}}
    answer(as_json, found, lambda: [typer.echo(path) for path in found["files"]])
    for figure in absent:
        say(f"Not drawn, {figure.name}: {figure.caption}")
