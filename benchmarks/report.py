"""The report of many runs: its size, and the memory and time that it takes to write.

python -m benchmarks.report            # 50 runs x 200 rounds x 100 clients, made up
python -m benchmarks.report 4 20 10
"""

import json
import random
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedlora.reporting.html import render_page
from fedlora.reporting.load import load_runs
from fedlora.schema import dumps

PARTS = [f"vit.encoder.layer.{i}.attention.{name}_proj" for i in range(12) for name in "qv"]


def record(draw: random.Random, round: int, clients: int) -> dict[str, Any]:
    """A round's record, of the form and size that a run of ViT leaves."""
    own = [draw.random() for _ in range(clients)]
    figures = ("served", "fedit", "best", "drift", "cosine A", "cosine B")
    return {
        "round": round, "cohort": list(range(clients)), "loss": {str(k): x for k, x in enumerate(own)},
        "weights": {part: {name: draw.random() for name in figures} for part in PARTS},
        "global": {"accuracy": draw.random(), "loss": draw.random()},
        "clients": {"mean": sum(own) / clients, "worst": min(own), "worst_client": own.index(min(own)), "each": own},
        "absent": {str(k): "dropped out (clients.dropout)" for k in draw.sample(range(clients), clients // 10)},
        "bytes": {"up": {"adapter": 10**6, "head": 10**5}, "down": {"adapter": 10**6}},
        "seconds": {"train": 1.0, "combine": 0.1, "measure": 0.1, "evaluate": 0.3, "total": 1.6},
    }  # fmt: skip


def make(place: Path, many: int, rounds: int, clients: int) -> list[Path]:
    """Folders of runs that differ in their learning rate, and so are a method each to a report."""
    found = []
    for number in range(many):
        draw, folder = random.Random(number), place / f"run-{number}"
        folder.mkdir()
        table = {"rounds": rounds, "seed": number, "model": {"name": "vit"}, "clients": {"count": clients},
                 "task": {"name": "image-classification", "data": "digits"},
                 "training": {"learning_rate": 1e-3 * (number + 1)}}  # fmt: skip
        (folder / "config.toml").write_text(dumps(table))
        with open(folder / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(record(draw, round, clients)) + "\n" for round in range(1, rounds + 1))
        rows = {str(k): {"train": 100, "test": 10, "labels": [10] * 10} for k in range(clients)}
        (folder / "rows.json").write_text(json.dumps({"labels": list("0123456789"), "clients": rows}))
        found.append(folder)
    return found


def measure(many: int = 50, rounds: int = 200, clients: int = 100) -> dict[str, float]:
    """Megabytes of the records and of the page, processor seconds, and the peak of memory above that of the imports."""
    with TemporaryDirectory() as place:
        folders = make(Path(place), many, rounds, clients)
        read = sum((folder / "metrics.jsonl").stat().st_size for folder in folders)
        render_page(load_runs(folders[:1]))  # imports, and Vega's own memory
        before, began = peak(), time.process_time()
        size = len(render_page(load_runs(folders)).encode())
        taken = time.process_time() - began
    return {"runs": many, "rounds": rounds, "clients": clients, "MB read": read / 1e6, "MB of the page": size / 1e6,
            "processor seconds": taken, "MB of memory": peak() - before, "MB with imports": peak()}  # fmt: skip


def peak() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))
