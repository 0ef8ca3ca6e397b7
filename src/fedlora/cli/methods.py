"""Commands about methods: methods, new-method, cite."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli import _completion
from fedlora.cli._options import Json, print_result, say


def methods_command(
    name: Annotated[
        str | None, typer.Argument(help="One method [default: all].", autocompletion=_completion.complete_method)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods with their claims and costs, or show one."""
    from fedlora.methods import METHODS
    from fedlora.reporting import method_catalog as catalog

    if name is not None:
        entry = catalog.describe_method(name)
        return print_result(as_json, entry, lambda: catalog.format_method(entry))
    entries = [catalog.describe_method(name) for name in METHODS.classes()]
    for error in METHODS.errors():
        say(f"fedlora: {error}")
    print_result(as_json, entries, lambda: [catalog.tabulate_catalog(entries)])


def new_method_command(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by '-', e.g. fed-svd.")],
    paper: Annotated[str | None, typer.Option(help="Where it is published.")] = None,
    root: Annotated[Path, typer.Option(help="The checkout to write into.")] = Path("."),
) -> None:
    """Write a method's skeleton and its test; the laws find it by themselves."""
    from fedlora.cli._new_method import write_method

    for path in write_method(name, paper, root):
        typer.echo(path)


def cite_command(
    what: Annotated[str, typer.Argument(metavar="METHOD|RUN", help="A method, or a run's or a comparison's folder.",
                                        autocompletion=_completion.complete_method)],
) -> None:  # fmt: skip
    """Print BibTeX: of fedlora and a method's paper, or of all that a run used."""
    from fedlora.reporting.citations import collect_citations

    typer.echo("\n".join(map(str, collect_citations(what))), nl=False)
