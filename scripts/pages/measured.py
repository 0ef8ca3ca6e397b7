"""Figures of docs/results.md and docs/results/*.jsonl, and their places in pages that are written by hand.

A page asks for a figure in a comment and gets it between two:
``<!-- = results; Banking77, eight; ravan; shared model -->0.568 ± 0.025<!-- . -->``. What comes first says where it is
from:

- ``results; HEADING; ROW; COLUMN``: a cell of a table in results.md. The heading and the column are found by their
  beginning, the row by its whole name.
- ``study; FILE; LABEL; KEY``: mean ± sample standard deviation over the seeds of a file in docs/results, at the
  label's rate. The key is dotted, e.g. ``value``, ``clients.worst``, ``bytes.up`` (bytes are given in MB).
- ``table; FILE``: a Markdown table of a study, a row a label.
"""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPENS = re.compile(r"<!-- = (?P<asked>.+?) -->(?P<old>.*?)<!-- \. -->", re.S)


@dataclass(frozen=True)
class Row:
    """One row of a table in results.md."""

    heading: str
    name: str
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Results:
    """All that was measured: the rows of results.md, and the finished runs of each study."""

    rows: Sequence[Row]
    studies: Mapping[str, Sequence[Mapping[str, Any]]]

    @staticmethod
    def read(docs: Path) -> "Results":
        """What lies in a docs folder."""
        text = (docs / "results.md").read_text(encoding="utf-8")
        studies = {path.stem: _runs(path) for path in sorted((docs / "results").glob("*.jsonl"))}
        return Results(list(tables(text)), {name: runs for name, runs in studies.items() if runs})

    def filled(self, text: str, page: str) -> str:
        """The page with its figures; ``ValueError`` names one that is not there."""
        try:
            return OPENS.sub(lambda m: f"<!-- = {m['asked']} -->{self.answer(m['asked'])}<!-- . -->", text)
        except LookupError as error:
            raise ValueError(
                f"{page} asks for {error.args[0]}; see scripts/pages/measured.py for how to ask."
            ) from error

    def answer(self, asked: str) -> str:
        """What one comment asks for."""
        kind, *rest = [part.strip() for part in asked.split(";")]
        known = {"results": (self.cell, 3), "study": (self.mean, 3), "table": (self.table, 1)}
        if kind not in known or len(rest) != known[kind][1]:
            raise LookupError(f"{asked!r}, which is no question that is known")
        return known[kind][0](*rest)

    def cell(self, heading: str, name: str, column: str) -> str:
        """A cell of results.md, without its emphasis."""
        for row in self.rows:
            if row.heading.startswith(heading) and row.name == name:
                for title, value in row.cells.items():
                    if title.startswith(column):
                        return value.replace("**", "")
        raise LookupError(f"the cell {heading!r}, {name!r}, {column!r} of results.md, which is not there")

    def mean(self, study: str, label: str, key: str) -> str:
        """Over the seeds of a study; bytes in MB."""
        found = [_at(run, key) for run in self.studies.get(study, ()) if run["label"] == label]
        if not found or None in found:
            raise LookupError(f"{key!r} of {label!r} in docs/results/{study}.jsonl, which has none")
        return spread([x / 1e6 for x in found], 2) if key.startswith("bytes") else spread(found, 3)

    def table(self, study: str) -> str:
        """A row a label, in the file's order."""
        runs = self.studies.get(study)
        if not runs:
            raise LookupError(f"the study {study!r}, which has no finished run in docs/results")
        lines = ["| | shared model | clients' own, mean | worst client | MB up | seeds |", "|---|---|---|---|---|---|"]
        for label in dict.fromkeys(run["label"] for run in runs):
            seeds = sum(run["label"] == label for run in runs)
            shared = any(run["global"] for run in runs if run["label"] == label)
            cells = [self.mean(study, label, f"global.{runs[0]['metric']}") if shared else "–"]
            cells += [self.mean(study, label, key) for key in ("clients.mean", "clients.worst", "bytes.up")]
            lines.append(f"| {label} | {' | '.join(cells)} | {seeds} |")
        return "\n" + "\n".join(lines) + "\n"


def tables(text: str) -> Iterator[Row]:
    """Every row of every table under its heading; ``a, b`` is two rows, and its cell ``1, 2`` has one each."""
    heading, titles = "", []
    for line in text.splitlines():
        if line.startswith("#"):
            heading, titles = line.lstrip("# "), []
        elif not line.startswith("|"):
            titles = []
        elif not titles:
            titles = _split(line)
        elif not set(line) <= set("|-: "):
            name, *cells = _split(line)
            names = name.split(", ")
            for number, one in enumerate(names):
                yield Row(heading, one, dict(zip(titles[1:], [_own(cell, number, len(names)) for cell in cells])))


def spread(found: Sequence[float], digits: int) -> str:
    """``mean ± sample standard deviation``, or the one figure where all are alike."""
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean if len(set(found)) < 2 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def anchor(heading: str) -> str:
    """The part of an address that a heading gets, on the site and in file browsers alike."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def _own(cell: str, number: int, names: int) -> str:
    """A row's part of a cell, where it has one for each of the row's names."""
    parts = cell.split(", ")
    return parts[number] if len(parts) == names else cell


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs of a study; trials on validation rows, and files of another kind, have none."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.get("phase") == "run" and row["value"] is not None and not row["setting"]]


def _at(run: Mapping[str, Any], key: str) -> Any:
    found: Any = run
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
