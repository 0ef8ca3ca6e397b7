"""Attacks against defences on Banking77: 20 clients, of which none, a tenth or three tenths are hostile; three seeds.

``python -m benchmarks.attacks --models DIR --data DIR --minutes 60`` runs what is still missing and stops in time; what
was finished is never run again. ``python -m benchmarks.attacks --table`` makes the tables of docs/robustness.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import RESULTS, ROOT, SEEDS, Book, local
from fedlora.comparison import Cell, execute
from fedlora.config import Table, build, overridden, read_table

CONFIG = ROOT / "examples" / "papers" / "fedrot-lora" / "banking77-small.toml"
BASE = ("clients.count=20", "evaluation.measure=false")
OPEN = "hygiene={norm_limit=1e30, factor_limit=1e30}"  # what is no number is refused all the same
SHARES = (0.3, 0.1)
NONE = "none"
ATTACKS: dict[str, str] = {
    NONE: "",
    "nan": "name='nan'",
    "sign-flip": "name='sign-flip'",
    "scaling": "name='scaling'",
    "gaussian": "name='gaussian'",
    "label-flip": "name='label-flip'",
    "backdoor": "name='backdoor', scale=2.0",
    "inner-product": "name='inner-product'",
    "collude": "name='collude', scale=2.0",
    "copy": "name='copy'",
    "rescale": "name='rescale'",
    "rotate": "name='rescale', how='rotate'",
}
DEFENCES: dict[str, tuple[str, ...]] = {
    "no limits": (OPEN,),
    "hygiene": (),
    "krum": ("robust={name='krum'}",),
    "multi-krum": ("robust={name='multi-krum'}",),
    "multi-krum, no limits": ("robust={name='multi-krum'}", OPEN),
    "trimmed": ("robust={name='trimmed'}",),
    "median-of-means": ("robust={name='median-of-means'}",),
    "geometric-median": ("robust={name='geometric-median'}",),
    "clip": ("robust={name='clip'}",),
}


def missing(
    book: Book, attacks: Sequence[str], defences: Sequence[str], method: str, seeds: Sequence[int] = SEEDS
) -> Iterator[dict[str, Any]]:
    """What is still to run: seed by seed, so that every cell of the table has one before any has two."""
    for seed in seeds:
        for attack in attacks:
            for share in (0.0,) if attack == NONE else SHARES:
                for defence in defences:
                    key = {"method": method, "attack": attack, "share": share, "defence": defence, "seed": seed}
                    if book.find(**key) is None:
                        yield key


def table_of(key: dict[str, Any], models: Path, data: Path, more: Sequence[str] = ()) -> Table:
    """The configuration of one run, on local copies."""
    hostile = [] if key["attack"] == NONE else [f"attack={{{ATTACKS[key['attack']]}, share={key['share']}}}"]
    own = [*BASE, f"method.name={key['method']}", f"seed={key['seed']}", *hostile, *DEFENCES[key["defence"]], *more]
    return local(overridden(read_table(CONFIG), own), models, data, "test")


def figures(cell: Cell) -> dict[str, Any]:
    """What is kept of a run: accuracy, the attack's success, and who was quarantined."""
    if cell.summary is None:
        return {"accuracy": None, "failure": cell.failure}
    final = cell.summary["final"]
    return {
        "accuracy": final["global"]["accuracy"],
        "success": final.get("attack", {}).get("success"),
        "quarantined": {client: len(rounds) for client, rounds in cell.summary.get("quarantined", {}).items()},
        "seconds": cell.summary["seconds"]["whole"],
        "server_seconds": cell.summary["seconds"]["total"] - cell.summary["seconds"]["train"],
    }


def tables(book: Book, method: str) -> str:
    """Accuracy, and below it the success of the attacks that have one, mean over seeds (and how many)."""
    texts = []
    for figure in ("accuracy", "success"):
        lines = [f"| {figure} | " + " | ".join(DEFENCES) + " |", "|---" * (len(DEFENCES) + 1) + "|"]
        for attack in ATTACKS:
            for share in (0.0,) if attack == NONE else reversed(SHARES):
                rows = [r for r in book.rows if (r["method"], r["attack"], r["share"]) == (method, attack, share)]
                cells = [_cell([r.get(figure) for r in rows if r["defence"] == defence]) for defence in DEFENCES]
                if any(cell != "–" for cell in cells):
                    name = attack if attack == NONE else f"{attack}, {share:.0%}"
                    lines.append(f"| {name} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _cell(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "diverged" if values and any(value is None for value in values) and len(values) > 2 else "–"
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.3f}{spread}"


def main() -> None:
    """Runs what is missing as far as the time goes, or prints the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", type=Path, help="folder of models")
    options.add_argument("--data", type=Path, help="folder of data sets")
    options.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    options.add_argument("--attacks", default=",".join(ATTACKS), help="names, with commas")
    options.add_argument("--defences", default=";".join(DEFENCES), help="names, with semicolons")
    options.add_argument("--method", default="fedit")
    options.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    options.add_argument("--folder", type=Path, default=RESULTS, help="where attacks.jsonl is")
    options.add_argument("--table", action="store_true")
    options.add_argument("-o", dest="more", action="append", default=[], help="key=value, for a trial of the script")
    asked, began = options.parse_args(), time.monotonic()
    book = Book.of("attacks", asked.folder)
    if asked.table:
        print(tables(book, asked.method))
        return
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    while time.monotonic() - began < asked.minutes * 60:
        names = asked.attacks.split(","), asked.defences.split(";")
        key = next(missing(book, *names, asked.method, seeds), None)
        if key is None:
            break
        own = table_of(key, asked.models, asked.data, asked.more)
        build(own)
        row = {**key, **figures(execute(Cell(key["method"], key["seed"], own, None), threads=1))}
        book.add(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
