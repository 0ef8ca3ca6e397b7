"""Shared parts of the commands: options, parsing, results on stdout, messages on stderr."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedlora.cli import _completion

Override = Annotated[
    list[str] | None,
    typer.Option(
        "-o", "--override", metavar="KEY=VALUE", help="Set one value, e.g. -o training.learning_rate=1e-3.",
        autocompletion=_completion.complete_override,
    ),
]  # fmt: skip
Methods = Annotated[
    str | None,
    typer.Option(
        help="Methods by name, with commas [default: the config's].", autocompletion=_completion.complete_methods
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration.")]


class _PlainHelp:
    def get_help(self, ctx: click.Context) -> str:
        """Return the text of ``--help``; Typer escapes its brackets for rich wherever rich is installed."""
        text: str = super().get_help(ctx)  # type: ignore[misc]
        return text.replace("\\[", "[")


class Command(_PlainHelp, TyperCommand):
    """A command whose ``--help`` is plain text."""


class PlainGroup(_PlainHelp, TyperGroup):
    """A group of commands whose ``--help`` is plain text."""


def parse_numbers(text: str, kind: type, option: str, example: str) -> list:
    """Parse the numbers of an option, which are separated by commas."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError as error:
        needed = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} is {text!r}; it should be {needed} with commas, e.g. {example}.") from error


def parse_names(text: str | None) -> list[str]:
    """Parse the names of an option, which are separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def print_result(as_json: bool, value: Any, tables: Callable[[], Iterable] = tuple, whole: Sequence[str] = ()) -> None:
    """Print ``value`` as JSON on stdout, or else ``tables`` and then ``whole``: lines that are not wrapped."""
    if as_json:
        typer.echo(json.dumps(value, indent=2))
        return
    from fedlora.reporting import terminal

    terminal.show(*tables(), whole=tuple(whole))


def say(text: str) -> None:
    """Print a message on stderr."""
    typer.echo(text, err=True)


def choose_folder(name: str) -> Path:
    """Return the first of the folders ``runs/name-1``, ``runs/name-2``, … that does not exist."""
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path
