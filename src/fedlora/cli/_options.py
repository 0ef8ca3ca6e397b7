"""What the commands have in common: options, answers on stdout, words on stderr."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli import _completion as completing

Override = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads Optional
    typer.Option(
        "-o", "--override", metavar="KEY=VALUE", help="Set one value, e.g. -o training.learning_rate=1e-3.",
        autocompletion=completing.override,
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to run.")]


def numbers(text: str, kind: type, option: str, example: str) -> list:
    """The numbers of an option, with commas between them."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} is {text!r}; it should be {what} with commas, e.g. {example}.") from error


def names(text: str | None) -> list[str]:
    """The names of an option, with commas between them."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def answer(as_json: bool, value, table) -> None:
    """Tables and JSON go to stdout."""
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        table()


def say(text: str) -> None:
    """What is no result goes to stderr."""
    typer.echo(text, err=True)


def numbered(folder: Path) -> Path:
    """``folder-1``, or the first number that is free."""
    number = 1
    while (path := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path
