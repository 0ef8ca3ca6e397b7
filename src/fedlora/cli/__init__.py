"""The command line: each command parses, calls one function and prints. ``--help`` imports nothing heavy."""

import errno
import os
import sys
from typing import Annotated

import typer

from fedlora.cli import (
    authoring,
    chatting,
    checking,
    flower,
    folders,
    grading,
    preparing,
    reporting,
    running,
    studying,
    watching,
)
from fedlora.cli.speech import say
from fedlora.limits import shown

DISK_FULL = "the disk is full; what was written before is kept: free some space, or choose another --out."

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tune one pretrained transformer together without sharing data: federated LoRA, done exactly.",
)  # fmt: skip


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Fine-tune one pretrained transformer together without sharing data: federated LoRA, done exactly."""


for command in (
    preparing.plan, preparing.sweep, running.run, running.resume, running.compare, watching.watch,
    folders.show, reporting.report, reporting.plots, folders.personal, folders.aggregate, folders.export,
    studying.similarity, chatting.chat, grading.solve, grading.grade,
    authoring.methods, authoring.cite, checking.doctor, running.demo,
):  # fmt: skip
    app.command()(command)
app.command("new-method")(authoring.new_method)
app.add_typer(flower.app, name="flower")


def main() -> None:
    """The entry point: a user's mistake is one sentence on stderr and exit status 2, without a traceback."""
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        typer.echo(f"fedlora {version('fedlora')}")
        return
    try:
        app(standalone_mode=True)
    except SystemExit as left:  # typer leaves without a word where Ctrl-C was pressed
        if isinstance(getattr(left.__context__, "__cause__", None), KeyboardInterrupt):
            say("Stopped.")
        raise
    except KeyboardInterrupt:
        say("Stopped.")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("FEDLORA_TRACEBACK"):
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC
        text = DISK_FULL if full else str(error)
        say(f"fedlora: {shown(' '.join(text.split()), len(text))}")
        sys.exit(2)
