"""Commands about methods: methods, new-method."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli.speech import Json, answer


def methods(
    name: Annotated[Optional[str], typer.Argument(help="One method; all, where none is named.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """List the methods with their claims and costs, or show one."""
    from fedlora import catalogue
    from fedlora.report import tables

    if name is None:
        found = catalogue.entries()
        answer(as_json, found, lambda: tables.methods(found))
    else:
        one = catalogue.entry(name)
        answer(as_json, one, lambda: tables.method(one))


def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by '-', e.g. fed-svd.")],
    paper: Annotated[Optional[str], typer.Option(help="Where it is published.")] = None,  # noqa: UP045
    root: Annotated[Path, typer.Option(help="The checkout to write into.")] = Path("."),
) -> None:
    """Write a method's skeleton and its test; the laws find it by themselves."""
    from fedlora.scaffold import new_method as write

    for path in write(name, paper, root):
        typer.echo(path)
