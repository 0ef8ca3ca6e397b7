"""The command that talks with what a run has trained: chat."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedlora.cli._options import say


def chat(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a causal-lm run.")],
    client: Annotated[Optional[int], typer.Option(help="This client's own model [default: the shared one].")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    stop: Annotated[Optional[list[str]], typer.Option(help="A text that ends an answer.")] = None,  # noqa: UP045
    system: Annotated[Optional[str], typer.Option(help="What a chat template's system message says.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="Answer this and leave.")] = None,  # noqa: UP045
) -> None:
    """Let a run's model write: answers to --prompt, to what is typed, or to each line of stdin."""
    from fedlora.runs.chat import Chat
    from fedlora.runs.folder import RunFolder
    from fedlora.tasks.networks.generation import GenerationSettings

    writing = GenerationSettings(max_new_tokens, temperature, top_p, tuple(stop or ()))
    talk = Chat.open(RunFolder.open(folder), client, system, seed)
    if talk.note:
        say(talk.note)
    if prompt is not None:
        typer.echo(talk.say(prompt, writing))
    elif sys.stdin.isatty():
        say("Type a prompt and Return; Ctrl-D ends.")
        for line in _read_lines():
            _print_answer(talk, line, writing)
    else:
        for line in sys.stdin:
            typer.echo(talk.say(line.rstrip("\n"), writing))


def _read_lines() -> Iterator[str]:
    import readline  # noqa: F401 - input() has a history and can be edited then

    while True:
        try:
            line = input("> ")
        except EOFError:
            say("")
            return
        if line.strip():
            yield line


def _print_answer(talk, line: str, writing) -> None:
    """Print the answer to a line; a prompt that is too long is reported and does not end the conversation."""
    try:
        typer.echo(talk.say(line, writing))
    except ValueError as error:
        say(str(error))
