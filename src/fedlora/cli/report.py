"""Commands about runs, finished or not: report, plots, similarity, watch."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._options import Json, print_result, say

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or comparisons, finished or not.")]


def report_command(
    runs: Runs, out: Annotated[Path, typer.Option(help="The file; an existing one is replaced.")] = Path("report.html")
) -> None:
    """Write a report on runs as one HTML file that needs no network; several runs are compared."""
    from fedlora.api import write_report

    say(f"{out} ({write_report(runs, out).stat().st_size / 1e6:.1f} MB): open it in any browser.")


def plots_command(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="A folder for the files.")],
    width: Annotated[float, typer.Option(help="Of a figure, in millimetres: a paper's column.")] = 84.0,
    as_json: Json = False,
) -> None:
    """Write each figure as SVG, PDF and PNG at a paper's column width, and each table as CSV, Markdown and LaTeX."""
    from fedlora.reporting.files import write_files
    from fedlora.reporting.load import load_runs

    written, absent = write_files(load_runs(runs), out, width)
    result = {"files": [str(path) for path in written], "absent": {figure.name: figure.caption for figure in absent}}
    print_result(as_json, result, whole=result["files"])
    for figure in absent:
        say(f"Not drawn, {figure.name}: {figure.caption}")


def similarity_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose clients keep their own factors.")],
    as_json: Json = False,
) -> None:
    """Show the similarity of the clients' A and B, weight by weight."""
    from fedlora.reporting.similarity import measure_similarity, tabulate_similarity

    weights, mean = measure_similarity(folder)
    print_result(as_json, {"weights": weights, "mean": mean}, lambda: tabulate_similarity(weights, mean))


def watch_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, also before the run begins.")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 1.0,
) -> None:
    """Show a run under way: rounds, clients, loss, accuracy, error, bytes, time left. Ends with the run."""
    from fedlora.reporting import watch
    from fedlora.reporting.terminal import PlainConsole
    from fedlora.runs.progress_file import ProgressReader

    console, reader = PlainConsole(), ProgressReader(folder.expanduser())
    try:
        if console.is_terminal:
            status = watch.watch_screen(reader, console, every)
        else:
            status = watch.watch_lines(reader, lambda text: print(text, flush=True), every)
    except KeyboardInterrupt:
        say("The run goes on; it was only watched.")
        return
    if status.state != "finished":
        say(f"fedlora: the run is {status.state}; what was finished is in {folder}.")
        sys.exit(1)
