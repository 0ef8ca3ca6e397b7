"""Accuracy against ε, for whole clients and for single rows: FedIT, FFA-LoRA, FedSA-LoRA and Ravan on Banking77.

``python -m benchmarks.privacy --models DIR --data DIR --minutes 60`` runs what is still missing and stops in time; what
was finished is kept as JSON lines and never run again. Without ``target_epsilon`` (``null``) a run only clips: the line
to beat. Rates and clips are fixed here and not tuned on the results.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies import ROOT, Book
from fedlora.comparison import Cell, execute, for_label
from fedlora.config import Table, build, merged, overridden, read_table

METHODS = ("fedit", "ffa-lora", "fedsa-lora", "ravan")
LEVELS: dict[str, tuple[str, ...]] = {
    # Many small clients, a tenth of them a round: noise on a sum is divided by the cohort.
    "client": (
        "clients.count=600", "clients.sampling=poisson", "clients.rate=0.1", "clients.split={name = 'iid'}",
        "privacy.clip=0.5", "rounds=20", "training.local_steps=2",
    ),
    # Few clients with many rows: each adds its own noise.
    "example": (
        "clients.count=3", "clients.split={name = 'iid'}", "privacy.clip=1.0", "rounds=10", "training.local_steps=10",
        "training.batch_size=64",
    ),
}  # fmt: skip
TARGETS: tuple[float | None, ...] = (None, 50.0, 20.0, 8.0, 3.0)
SEEDS = (0, 1, 2)
RATE = 5e-3


def missing(level: str, book: Book, targets=TARGETS, seeds=SEEDS) -> Iterator[dict[str, Any]]:
    """The runs that are not in the book yet, the coarse line before its repetitions."""
    for seed in seeds:
        for target in targets:
            for method in METHODS:
                key = {"level": level, "method": method, "target": target, "seed": seed}
                if book.find(**key) is None:
                    yield key


def table(key: dict[str, Any], models: Path, data: Path, short: bool = False) -> Table:
    """The configuration of one run, on local copies."""
    noise = ["privacy.noise_multiplier=0.0"] if key["target"] is None else [f"privacy.target_epsilon={key['target']}"]
    base = overridden(
        read_table(ROOT / "examples" / "papers" / "fedrot-lora" / "banking77-small.toml"),
        [f"privacy.level={key['level']}", *noise, f"training.learning_rate={RATE}"],
    )
    base = overridden({k: v for k, v in base.items() if k != "compare"}, LEVELS[key["level"]])
    base = merged(base, {"model": {"name": str(models / "minilm-l6-h384")}, "task": {"data": str(data / "banking77")}})
    if short:
        base = overridden(base, ["rounds=1", "training.local_steps=1", "task.train_rows=1200", "task.test_rows=700"])
    return {**for_label(base, key["method"]), "seed": key["seed"]}


def figures(cell: Cell) -> dict[str, Any]:
    """What is kept of a run: the metric on the shared model, or the clients' own mean, and what was spent."""
    if cell.summary is None:
        return {"value": None, "failure": cell.failure}
    s, final = cell.summary, cell.summary["final"]
    own = final["clients"]["mean"] if s["personal"] else final["global"][s["metric"]["name"]]
    spent = {k: s["privacy"][k] for k in ("epsilon", "delta", "noise_multiplier", "clip", "sampling_rate")}
    return {"value": own, "clients": final["clients"]["mean"], **spent, "seconds": s["seconds"]["whole"]}


def main() -> None:
    """Runs what is missing, as far as the time goes; ``--short`` runs one tiny round and keeps nothing."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("levels", nargs="*", default=list(LEVELS))
    options.add_argument("--models", type=Path, required=True, help="folder of models")
    options.add_argument("--data", type=Path, required=True, help="folder of data sets")
    options.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    options.add_argument("--short", action="store_true", help="one tiny run a level, to see that it works")
    asked, began = options.parse_args(), time.monotonic()
    for level in asked.levels:
        book = Book.of("" if asked.short else f"privacy-{level}")
        while time.monotonic() - began < asked.minutes * 60:
            key = next(missing(level, book, TARGETS[3:] if asked.short else TARGETS), None)
            if key is None:
                break
            own = table(key, asked.models, asked.data, asked.short)
            build(own)
            row = {**key, **figures(execute(Cell(key["method"], key["seed"], own, None), threads=1))}
            print(json.dumps(row), flush=True)
            if asked.short:
                break
            book.add(row)


if __name__ == "__main__":
    main()
