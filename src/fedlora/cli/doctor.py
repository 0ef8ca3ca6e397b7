"""The command that looks at the installation: doctor."""

import sys

import typer

from fedlora.cli._options import Json, answer, say


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and memory, and try one small thing of each installed extra; exit 1 if one is broken."""
    from fedlora.cli._doctor import examine
    from fedlora.cli._doctor_report import health

    found = examine(told=lambda name: say(f"trying {name} ...") if sys.stderr.isatty() else None)
    answer(as_json, found, lambda: health(found))
    if found["broken"]:
        raise typer.Exit(1)
