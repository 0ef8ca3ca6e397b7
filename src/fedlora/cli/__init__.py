"""The command line: each command parses, calls one function and prints. ``--help`` imports nothing heavy."""

import os
import sys
from typing import Annotated

import typer

from fedlora.cli import chat as chatting
from fedlora.cli import code_eval as grading
from fedlora.cli import doctor as checking
from fedlora.cli import export as folders
from fedlora.cli import flower
from fedlora.cli import methods as authoring
from fedlora.cli import plan as preparing
from fedlora.cli import report as reporting
from fedlora.cli import run as running
from fedlora.cli import study as studying
from fedlora.cli import watch as watching
from fedlora.cli._options import say
from fedlora.cli._plain import Command, Group
from fedlora.runs import error_log as crash

app = typer.Typer(
    cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
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
    app.command(cls=Command)(command)
app.command("new-method", cls=Command)(authoring.new_method)
app.add_typer(flower.app, name="flower")


def main() -> None:
    """The entry point: an error is one sentence on stderr and exit status 2, without a traceback.

    The traceback of an error that is no user's mistake is written to a file, which the sentence names.
    """
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
    except Exception:
        if os.environ.get("FEDLORA_TRACEBACK") or (error := sys.exc_info()[1]) is None:
            raise
        say(f"fedlora: {crash.sentence(error)}")
        sys.exit(2)
