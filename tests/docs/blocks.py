"""Fenced blocks of a Markdown page, with what the comments above them say about running them.

Comments that a reader of the source sees and a reader of the page does not:

- ``<!-- not run: needs a GPU -->`` above a block: it is listed and not run (Python is still compiled).
- ``<!-- fails: 2 -->`` above a block: its last command ends with this exit status.
- ``<!-- processes -->`` above a block: it starts real Flower processes, and runs in the tests marked ``flower``.
- ``<!-- written: for whom -->`` above a TOML block: it is a file of another kind, written under the name in its first line.
- ``<!-- said by: FILE -->`` above a block: a message, which test_errors.py looks for in that file.
- ``<!-- stand-in: mine.toml -->`` anywhere: the page's folder has a small configuration of the demo under this name.
- ``<!-- encoder: minilm -->`` anywhere: the page's folder has a small untrained text encoder under this name.
- ``<!-- decoder: llama -->`` anywhere: likewise a small untrained causal language model.
- ``<!-- in small: FILE -->`` anywhere: the page's folder has this file of the project as ``standins.small`` makes it.
- ``<!-- first: COMMAND -->`` anywhere: run in the page's folder before the page's blocks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)(?P<mark>`{3,}|~{3,})(?P<info>[^`\n]*)$")
COMMENT = re.compile(r"^\s*<!-- (?P<key>not run|fails|processes|written|said by)(?:: (?P<value>.+?))? -->\s*$")
SHELL = {"bash", "sh", "console"}
RUN = {*SHELL, "python", "toml"}
SHOWN = {"text", "json", "diff", "bibtex", "latex"}  # what is only read


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    page: str
    line: int
    language: str
    text: str
    said: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where to look."""
        return f"{self.page}:{self.line}"


def blocks(path: Path, root: Path) -> list[Block]:
    """All blocks of a page, in order. ``ValueError`` where one is not closed."""
    return list(_blocks(path.read_text(encoding="utf-8").splitlines(), path.relative_to(root).as_posix()))


def _blocks(lines: list[str], page: str) -> Iterator[Block]:
    said: dict[str, str] = {}
    numbered = iter(enumerate(lines, 1))
    for number, line in numbered:
        if comment := COMMENT.match(line):
            said[comment["key"]] = comment["value"] or ""
        elif opened := FENCE.match(line):
            body = []
            for _, inner in numbered:
                if inner.strip() == opened["mark"]:
                    break
                body.append(inner.removeprefix(opened["indent"]))
            else:
                raise ValueError(f"{page}:{number} opens a block that is not closed.")
            yield Block(
                page, number, opened["info"].split()[0] if opened["info"].strip() else "", "\n".join(body), said
            )
            said = {}
        elif line.strip():
            said = {}


def asides(path: Path, key: str) -> list[str]:
    """What the page's comments of one kind say, e.g. every ``first``."""
    return re.findall(rf"<!-- {key}: (.+?) -->", path.read_text(encoding="utf-8"))


def steps(block: Block) -> list[tuple[str, str | None]]:
    """Commands of a shell block and what each should print; None where the page does not show it."""
    if block.language != "console":
        return [(block.text, None)]
    found: list[tuple[str, str | None]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif line.startswith("> ") and found and found[-1][0].endswith("\\"):
            found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def agrees(printed: str, shown: str) -> bool:
    """Whether the output is what the page shows; ``...`` stands for anything, within a line or for lines."""
    pattern = re.escape(_plain(shown)).replace(re.escape("..."), ".*?")
    return re.fullmatch(pattern, _plain(printed), re.S) is not None


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
