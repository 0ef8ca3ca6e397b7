"""The command that looks at a run under way: watch."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._options import say


def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, also before the run begins.")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show a run under way: rounds, clients, loss, accuracy, error, bytes, time left. Ends with the run."""
    from fedlora.reporting import watch as watching
    from fedlora.reporting.terminal import Plain
    from fedlora.runs.progress_file import ProgressReader

    console, following = Plain(), ProgressReader(folder.expanduser())
    try:
        if console.is_terminal:
            at = watching.live(following, console, every)
        else:
            at = watching.lines(following, lambda text: print(text, flush=True), every)
    except KeyboardInterrupt:
        say("The run goes on; it was only watched.")
        return
    if at.state != "finished":
        say(f"fedlora: the run is {at.state}; what was finished is in {folder}.")
        sys.exit(1)
