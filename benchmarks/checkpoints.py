"""What checkpoints cost: the share of a run's rounds that goes into saving them, in one run, for every method."""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from fedlora import run
from fedlora.engines.checkpoint import Checkpoints
from fedlora.methods import METHODS
from fedlora.runs.compare import for_label
from fedlora.runs.config import build

MODEL = "minilm-l3-h384-v8k"
CLIENTS, STEPS, ROUNDS = 10, 10, 4


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Seconds of each round with training and evaluation, and of its saving; and their ratio, which decides."""
    return {method: _one(method, table(models, data)) for method in METHODS.names()}


def table(models: Path, data: Path) -> dict[str, Any]:
    """Ten clients of ten steps, with their optimisers' moments kept, so that there is much to save."""
    return {
        "rounds": ROUNDS,
        "model": {"name": str(models / MODEL)},
        "task": {"name": "text-classification", "data": str(data / "banking77"), "test_rows": 300},
        "clients": {"count": CLIENTS},
        "adapter": {"name": "lora", "rank": 8, "alpha": 16},
        "training": {"local_steps": STEPS, "keep_optimizer": True},
        "engine": {"device": "cpu", "threads": 1},
    }


def _one(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    saving: list[float] = []
    real = Checkpoints.after

    def timed(self, *arguments, **options) -> None:
        began = time.perf_counter()
        real(self, *arguments, **options)
        saving.append(time.perf_counter() - began)

    with TemporaryDirectory() as place, patch.object(Checkpoints, "after", timed):
        found = run(build(for_label(settings, method)), Path(place) / "run")
        rounds = [record["seconds"]["total"] for record in found.records]
        size = sum(path.stat().st_size for path in (Path(place) / "run" / "checkpoints").rglob("*") if path.is_file())
    return {
        "a round, seconds": round(statistics.fmean(rounds), 3),
        "its checkpoint, seconds": round(statistics.fmean(saving), 4),
        "checkpoint / round": round(sum(saving) / sum(rounds), 4),
        "MB on disk at the end": round(size / 1e6, 2),
    }
