"""What to cite: BibTeX of a method, or of everything that a run used."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedlora.methods import METHODS
from fedlora.registry import unknown
from fedlora.reporting import bibliography
from fedlora.reporting.method_catalog import reference
from fedlora.runs.config import Config, ConfigError, build, read
from fedlora.runs.file_names import COMPARISON, CONFIG
from fedlora.runs.folder import read_json

HEAD = re.compile(r"\s*@(\w+)\{([^\s,{}]+),")
FIELD = re.compile(r"\s*(\w+)\s*=\s*\{")
LAST = re.compile(r"\s*,?\s*\}")


@dataclass(frozen=True)
class Entry:
    """One BibTeX entry."""

    kind: str
    key: str
    fields: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = "".join(f"  {name} = {{{value}}},\n" for name, value in self.fields)
        return f"@{self.kind}{{{self.key},\n{rows}}}\n"


def cited(what: str) -> list[Entry]:
    """The entries for a method's name, a run's folder or a comparison's, fedlora's own first.

    ``ConfigError`` where it is none of these.
    """
    place = Path(what).expanduser()
    known = METHODS.names()
    if what in known or (":" in str(what) and not place.exists()):
        return unique([ours(), *parsed(_of(reference(METHODS.load(what))))])
    if (place / COMPARISON).exists():
        configs = [build(row["table"]) for row in read_json(place / COMPARISON)["runs"]]
    elif (place / CONFIG).exists():
        configs = [read(place / CONFIG)]
    else:
        raise ConfigError(f"{unknown('method', what, known, 'methods').rstrip('.')}, nor is it a run's folder.")
    return unique([ours(), *(entry for config in configs for text in used(config) for entry in parsed(text))])


def ours() -> Entry:
    """fedlora itself, as it is installed."""
    title = "{fedlora}: federated low-rank adaptation of pretrained transformers"
    return Entry("misc", "fedlora", (("title", title), ("version", version("fedlora"))))


def used(config: Config) -> Iterator[str]:
    """BibTeX of each thing that a configuration uses."""
    yield _of(config.method)
    yield _of(config.method.adapter)
    for part in (config.robust, config.attack):
        yield "" if part is None else _of(part)
    yield bibliography.OPTIMIZERS.get(config.server.optimizer, "")
    if config.privacy.on:
        yield bibliography.PRIVACY[config.privacy.level]
        yield bibliography.ACCOUNTANTS[config.privacy.accountant]
    if config.flower.secure_aggregation:
        yield bibliography.SECURE_AGGREGATION
    for chain in (config.transport.upward, config.transport.downward):
        yield from (_of(stage) for stage in (() if chain is None else chain.stages))


def _of(thing: object) -> str:
    """Things of other packages need not say."""
    return str(getattr(thing, "cite", ""))


def unique(entries: Iterable[Entry]) -> list[Entry]:
    """One entry a paper, in order."""
    found: dict[str, Entry] = {}
    for entry in entries:
        found.setdefault(entry.key, entry)
    return list(found.values())


def parsed(text: str) -> list[Entry]:
    """The entries of a BibTeX text. ``ValueError`` where it is none."""
    found, at = [], 0
    while text[at:].strip():
        head = HEAD.match(text, at)
        if head is None:
            raise ValueError(
                f"no BibTeX entry begins at {text[at : at + 40]!r}; write @kind{{key, name = {{value}}, ...}}."
            )
        rows, at = _fields(text, head.end())
        found.append(Entry(head[1], head[2], tuple(rows)))
    return found


def _fields(text: str, at: int) -> tuple[Sequence[tuple[str, str]], int]:
    rows: list[tuple[str, str]] = []
    while (end := LAST.match(text, at)) is None:
        field = FIELD.match(text, at + (text[at : at + 1] == ","))
        if field is None:
            raise ValueError(f"no BibTeX field begins at {text[at : at + 40]!r}; write name = {{value}}.")
        at = _closed(text, field.end())
        rows.append((field[1], " ".join(text[field.end() : at - 1].split())))
    return rows, end.end()


def _closed(text: str, at: int) -> int:
    """Behind the brace that closes the one before ``at``."""
    depth = 1
    while depth and at < len(text):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    if depth:
        raise ValueError("a brace of a BibTeX entry is not closed; close it.")
    return at
