"""Commands whose ``--help`` is plain text."""

import click
from typer.core import TyperCommand, TyperGroup


def _unescape(text: str) -> str:
    """Typer escapes its brackets for rich wherever rich is installed, also where rich prints nothing."""
    return text.replace("\\[", "[")


class Command(TyperCommand):
    """A command without rich's escapes in its help."""

    def get_help(self, ctx: click.Context) -> str:
        """The text of ``--help``."""
        return _unescape(super().get_help(ctx))


class Group(TyperGroup):
    """A group of commands without rich's escapes in its help."""

    def get_help(self, ctx: click.Context) -> str:
        """The text of ``--help``."""
        return _unescape(super().get_help(ctx))
