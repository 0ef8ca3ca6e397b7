"""The command line: each command parses, calls one function and prints. ``--help`` imports nothing heavy."""

import os
import sys
from typing import Annotated

import typer

from fedlora.cli import chat, code_eval, doctor, export, flower, methods, report, run
from fedlora.cli._options import Command, PlainGroup, say
from fedlora.runs import error_log

app = typer.Typer(
    cls=PlainGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tune one pretrained transformer together without sharing data: federated LoRA, done exactly.",
)  # fmt: skip
for command in (
    run.plan_command, run.sweep_command, run.run_command, run.resume_command, run.compare_command,
    report.watch_command, export.show_command, report.report_command, report.plots_command, export.personal_command,
    export.aggregate_command, export.export_command, report.similarity_command, chat.chat_command,
    code_eval.solve_command, code_eval.grade_command, methods.methods_command, methods.cite_command,
    doctor.doctor_command, run.demo_command, methods.new_method_command,
):  # fmt: skip
    app.command(command.__name__.removesuffix("_command").replace("_", "-"), cls=Command)(command)
app.add_typer(flower.app, name="flower")


@app.callback()
def show_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Fine-tune one pretrained transformer together without sharing data: federated LoRA, done exactly."""


def main() -> None:
    """Run the command line; an error is one sentence on stderr and exit status 2, without a traceback.

    The traceback of an unexpected error is written to a file that the sentence names.
    """
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        typer.echo(f"fedlora {version('fedlora')}")
        return
    try:
        app(standalone_mode=True)
    except SystemExit as exit:  # typer exits silently after Ctrl-C
        if isinstance(getattr(exit.__context__, "__cause__", None), KeyboardInterrupt):
            say("Stopped.")
        raise
    except KeyboardInterrupt:
        say("Stopped.")
        sys.exit(130)
    except Exception:
        if os.environ.get("FEDLORA_TRACEBACK") or (error := sys.exc_info()[1]) is None:
            raise
        say(f"fedlora: {error_log.explain_error(error)}")
        sys.exit(2)
