"""The command ``chat``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._options import say


def chat_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a causal-lm run.")],
    client: Annotated[int | None, typer.Option(help="This client's own model [default: the shared one].")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message of a chat template.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and leave.")] = None,
) -> None:
    """Let a run's model write: answers to --prompt, to prompts typed on the terminal, or to each line of stdin."""
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
        _converse(talk, writing)
    else:
        for line in sys.stdin:
            typer.echo(talk.say(line.rstrip("\n"), writing))


def _converse(talk, writing) -> None:
    """Answer each line that is typed; a prompt that is too long is reported and does not end the conversation."""
    import readline  # noqa: F401 - gives input() a history and editing

    while True:
        try:
            line = input("> ")
        except EOFError:
            return say("")
        try:
            if line.strip():
                typer.echo(talk.say(line, writing))
        except ValueError as error:
            say(str(error))
