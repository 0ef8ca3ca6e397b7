"""The page of the command line, from the commands themselves."""

from collections.abc import Iterator
from typing import Any

from scripts.pages.methods import NOTE
from typer.main import get_command

INTRODUCTION = """# The command line

Tables and JSON go to stdout, everything else to stderr. A mistake is one sentence and exit status 2; Ctrl-C is 130.
`--json` prints the same values for machines. `-o KEY=VALUE` sets one value of the configuration, as often as you like.
"""


def page() -> str:
    """Every command with its arguments and options."""
    from fedlora.cli import app

    root = get_command(app)
    commands = list(_commands(root, "fedlora"))
    lines = [NOTE.format(source="src/fedlora/cli"), INTRODUCTION, "| command | what it does |", "|---|---|"]
    lines += [f"| [`{path}`](#{path.replace(' ', '-')}) | {first(one)} |" for path, one in commands]
    options = [_option(p) for p in root.params if _shown(p)]
    lines += ["", *_table("option of `fedlora` itself", options)]
    for path, one in commands:
        lines += ["", *section(path, one)]
    return "\n".join(lines).rstrip() + "\n"


def section(path: str, one: Any) -> list[str]:
    """One command."""
    arguments = [p for p in one.params if p.param_type_name == "argument"]
    usage = [path, *(_usage(p) for p in arguments), "[OPTIONS]"]
    text = "\n\n".join(" ".join(part.split()) for part in (one.help or "").split("\n\n"))
    lines = [f"## {path}", "", text, "", f"`{' '.join(usage)}`", ""]
    lines += _table("argument", [(f"`{_metavar(p)}`", _help(p)) for p in arguments])
    return lines + _table("option", [_option(p) for p in one.params if p not in arguments and _shown(p)])


def first(one: Any) -> str:
    """A command's first sentence."""
    return " ".join((one.help or "").split("\n\n")[0].split())


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, one in group.commands.items():
        if getattr(one, "hidden", False):
            continue
        if hasattr(one, "commands"):
            yield from _commands(one, f"{path} {name}")
        else:
            yield f"{path} {name}", one


def _shown(option: Any) -> bool:
    return not getattr(option, "hidden", False) and "--help" not in option.opts


def _usage(argument: Any) -> str:
    return _metavar(argument) if argument.required else f"[{_metavar(argument)}]"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option(option: Any) -> tuple[str, str]:
    names = ", ".join([*option.opts, *option.secondary_opts])
    flag = getattr(option, "is_flag", False)
    value = "" if flag else f" {option.metavar or option.type.name.upper()}"
    return f"`{names}{value}`", _help(option)


def _help(parameter: Any) -> str:
    text = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|").replace("<", "&lt;")
    default, flag = parameter.default, getattr(parameter, "is_flag", False)
    if parameter.required:
        return f"{text} Required." if parameter.param_type_name != "argument" else text
    plain = isinstance(default, str | int | float) and not flag and default != ""
    show = getattr(parameter, "show_default", True)
    return f"{text} [default: {default}]" if plain and show and "[default" not in text else text


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""]
