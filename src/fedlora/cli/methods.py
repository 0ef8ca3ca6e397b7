"""Commands about methods: methods, new-method, cite."""

import re
from importlib.resources import files
from pathlib import Path
from string import Template
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
    for path in write_method(name, paper, root):
        typer.echo(path)


def write_method(name: str, paper: str | None = None, root: Path = Path(".")) -> list[Path]:
    """Write ``src/fedlora/methods/NAME.py`` and ``tests/methods/test_NAME.py`` below ``root``, a checkout."""
    from fedlora.files import write
    from fedlora.methods import METHODS

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(
            f"a method cannot be called {name!r}; its name is lower-case words joined by '-', e.g. fed-svd."
        )
    module = name.replace("-", "_")
    source, tests = root / "src" / "fedlora" / "methods", root / "tests" / "methods"
    for folder in (source, tests):
        if not folder.is_dir():
            raise ValueError(
                f"{str(root)!r} is no checkout of fedlora: it has no {folder.relative_to(root)}; set --root."
            )
    paths = [source / f"{module}.py", tests / f"test_{module}.py"]
    taken = next((path for path in paths if path.exists()), None)
    if taken or name in METHODS.names():
        raise ValueError(f"there is a method {name!r} already{f' ({taken})' if taken else ''}; choose another name.")
    words = {
        "title": name, "module": module, "paper": paper or "https://",
        "class": "".join(word.capitalize() for word in name.split("-")),
    }  # fmt: skip
    texts = [
        Template((files("fedlora.cli") / "templates" / f"{kind}.py.txt").read_text(encoding="utf-8")).substitute(words)
        for kind in ("method", "test_method")
    ]
    for path, text in zip(paths, texts, strict=True):
        write(path, text.encode())
    return paths


def cite_command(
    what: Annotated[str, typer.Argument(metavar="METHOD|RUN", help="A method, or a run's or a comparison's folder.",
                                        autocompletion=_completion.complete_method)],
) -> None:  # fmt: skip
    """Print BibTeX: of fedlora and a method's paper, or of all that a run used."""
    from fedlora.reporting.citations import collect_citations

    typer.echo("\n".join(map(str, collect_citations(what))), nl=False)
