"""Attacks against defences on Banking77: 20 clients, of which none, a tenth or three tenths are hostile; three seeds.

``python -m benchmarks.attacks --models DIR --data DIR --minutes 60`` runs what is still missing and stops in time; what
was finished is never run again. ``python -m benchmarks.attacks --table`` makes the tables of docs/robustness.md.

A client's turn depends on what it was sent, not on who defends the server: where another run of the same seed has sent
it the same bits in the same round, its turn is taken from there. The runs without an attack train every turn, so that
their seconds say what a defence costs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.studies import RESULTS, ROOT, SEEDS, Book, local
from benchmarks.study_tables import spread
from fedlora.engines.in_process import InProcess
from fedlora.files import digest
from fedlora.runs.config import Config, build
from fedlora.runs.run import Drive, run_config
from fedlora.schema import Table, apply_overrides, read_table
from fedlora.security.attacks._base import poison_task

CONFIG = ROOT / "examples" / "papers" / "fedrot-lora" / "banking77-small.toml"
BASE = ("clients.count=20", "evaluation.measure=false", "engine.threads=1")
OPEN = "validation={norm_limit=1e30, factor_limit=1e30}"  # what is no number is refused all the same
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
    "validation": (),
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
    return local(apply_overrides(read_table(CONFIG), own), models, data, "test")


Turns = dict[tuple[Any, ...], Any]  # what clients trained in one seed's runs, before an attack changed it


def remembering(known: Turns) -> Drive:
    """Runs in one process that look into ``known`` before they train."""
    return lambda config, f, watch, observe, take: take(_Remembering(watch, observe, known=known), f)


@dataclass
class _Remembering(InProcess):
    known: Turns = field(default_factory=dict)

    def train(self, client_turn, shared, state):
        if state.moments is not None:  # they would be a part of the key
            return super().train(client_turn, shared, state)
        f, turn = client_turn.federation, client_turn.turn
        lesson = None if poison_task(f.attack, f.task, turn) is f.task else repr(f.attack)
        key = lesson, turn.round, turn.client, digest(shared), digest(state.kept)
        if key not in self.known:
            self.known[key] = super().train(client_turn, shared, state)
        return self.known[key]


def figures(config: Config, known: Turns) -> dict[str, Any]:
    """What is kept of a run: accuracy, the attack's success, and who was quarantined."""
    try:
        summary: Mapping[str, Any] = run_config(config, drive=remembering(known) if config.attack else None).summary
    except FloatingPointError as error:
        return {"accuracy": None, "failure": str(error)}
    if summary["interrupted"]:
        raise KeyboardInterrupt
    found = {
        "accuracy": summary["final"]["global"]["accuracy"],
        "success": summary["final"].get("attack", {}).get("success"),
        "quarantined": {client: len(rounds) for client, rounds in summary.get("quarantined", {}).items()},
    }
    if config.attack:
        return found
    seconds = summary["seconds"]
    return {**found, "seconds": seconds["whole"], "server_seconds": seconds["total"] - seconds["train"]}


def tables(book: Book, method: str) -> str:
    """Accuracy, the success of the attacks that have one, and what a defence costs while nobody attacks."""
    found = [table_of_figure(book, method, figure) for figure in ("accuracy", "success")]
    return "\n\n".join([*found, costs(book, method)])


def table_of_figure(book: Book, method: str, figure: str) -> str:
    """Attacks by defences, mean over seeds."""
    lines = [_line(figure, DEFENCES), "|---" * (len(DEFENCES) + 1) + "|"]
    for attack in ATTACKS:
        for share in (0.0,) if attack == NONE else reversed(SHARES):
            cells = [
                _cell(book.all(method=method, attack=attack, share=share, defence=defence), figure)
                for defence in DEFENCES
            ]
            if any(cell != "–" for cell in cells):
                lines.append(_line(attack if attack == NONE else f"{attack}, {share:.0%}", cells))
    return "\n".join(lines)


def costs(book: Book, method: str) -> str:
    """What a defence costs while nobody attacks: accuracy, seconds, and uploads that were quarantined."""
    lines = [_line("nobody attacks", ("accuracy", "seconds but training", "uploads quarantined")), "|---" * 4 + "|"]
    for defence in DEFENCES:
        rows = book.all(method=method, attack=NONE, share=0.0, defence=defence)
        if rows:
            many = statistics.fmean(sum(row.get("quarantined", {}).values()) for row in rows)
            lines.append(_line(defence, (_cell(rows, "accuracy"), _cell(rows, "server_seconds"), f"{many:.1f}")))
    return "\n".join(lines)


def _line(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(rows: Sequence[Mapping[str, Any]], figure: str) -> str:
    values = [row[figure] for row in rows if row.get(figure) is not None]
    failed = sum("failure" in row for row in rows)
    parts = [spread(values, 2)] if values else []
    parts += [f"{failed} of {len(rows)} diverged"] if failed else []
    return " ".join(parts) or "–"


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
    known: dict[int, Turns] = {}
    while time.monotonic() - began < asked.minutes * 60:
        names = asked.attacks.split(","), asked.defences.split(";")
        key = next(missing(book, *names, asked.method, seeds), None)
        if key is None:
            break
        config = build(table_of(key, asked.models, asked.data, asked.more))
        known = {config.seed: known.get(config.seed, {})}  # another seed's turns cannot come again
        row = {**key, **figures(config, known[config.seed])}
        book.add(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
