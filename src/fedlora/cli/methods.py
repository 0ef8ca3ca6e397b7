"""Commands about methods: methods, new-method."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli import _completion as completing
from fedlora.cli._options import Json, answer, say


def methods(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="One method; all, where none is named.", autocompletion=completing.method),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods with their claims and costs, or show one."""
    from fedlora.reporting import method_catalog, terminal
    from fedlora.reporting.tables import methods as tables

    if name is None:
        from fedlora.methods import METHODS

        found = method_catalog.entries()
        for error in METHODS.errors():
            say(f"fedlora: {error}")
        answer(as_json, found, lambda: terminal.show(tables.methods(found)))
    else:
        one = method_catalog.entry(name)
        answer(as_json, one, lambda: terminal.show(*tables.method(one)))


def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by '-', e.g. fed-svd.")],
    paper: Annotated[Optional[str], typer.Option(help="Where it is published.")] = None,  # noqa: UP045
    root: Annotated[Path, typer.Option(help="The checkout to write into.")] = Path("."),
) -> None:
    """Write a method's skeleton and its test; the laws find it by themselves."""
    from fedlora.cli._new_method import new_method as write

    for path in write(name, paper, root):
        typer.echo(path)


def cite(
    what: Annotated[str, typer.Argument(metavar="METHOD|RUN", help="A method, or a run's or a comparison's folder.",
                                        autocompletion=completing.method)],
) -> None:  # fmt: skip
    """Print BibTeX: of fedlora and a method's paper, or of all that a run used."""
    from fedlora.reporting.citations import cited

    typer.echo("\n".join(map(str, cited(what))), nl=False)
