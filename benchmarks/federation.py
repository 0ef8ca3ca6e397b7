"""What a federation costs beyond training: memory by the number of clients, and time in no client."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import peak

MODEL = "minilm-l3-h384-v8k"
STEPS = 200  # a round, over all clients, where memory is compared


def memory(models: Path, data: Path) -> dict[str, Any]:
    """Peak resident memory of whole processes: 100 clients against 2, with as many steps in all.

    Activations depend on the longest row met; rows are padded to one length here, so that only clients differ.
    """
    found = {}
    for method in ("fedit", "fedsa-lora"):
        peaks = {count: _child(models, data, method, count, STEPS // count, 2, 32)["peak_mb"] for count in (2, 100)}
        found[method] = {"MB at 2 clients": peaks[2], "MB at 100 clients": peaks[100], "ratio": peaks[100] / peaks[2]}
    return found


def overhead(models: Path, data: Path) -> dict[str, Any]:
    """The share of a round that is neither training nor evaluation: 20 clients of 10 steps."""
    found = {}
    for method in ("fedit", "flora-na", "fedrot-lora", "ravan"):
        found[method] = {"share outside training and evaluation": _child(models, data, method, 20, 10, 3)["share"]}
    return found


def _child(models: Path, data: Path, method: str, *numbers: int) -> dict[str, float]:
    asked = json.dumps([str(models / MODEL), str(data / "banking77"), method, *numbers])
    command = [sys.executable, "-m", "benchmarks.federation", asked]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def _run(
    model: str, data: str, method: str, clients: int, steps: int, rounds: int, length: int | None = None
) -> dict[str, float]:
    from fedlora import run
    from fedlora.runs.compare import for_label
    from fedlora.runs.config import build

    table = {
        "rounds": rounds,
        "model": {"name": model},
        "task": {
            "name": "text-classification",
            "data": data,
            "test_rows": 300,
            "max_length": length or 128,
            "pad_to_max_length": length is not None,
        },
        "clients": {"count": clients},
        "adapter": {"name": "lora", "rank": 8, "alpha": 16},
        "training": {"local_steps": steps},
        "engine": {"device": "cpu", "threads": 1},
    }
    records = run(build(for_label(table, method))).records
    whole = sum(r["seconds"]["total"] for r in records)
    inside = sum(r["seconds"]["train"] + r["seconds"]["evaluate"] for r in records)
    return {"peak_mb": round(peak.megabytes(), 1), "share": round((whole - inside) / whole, 4)}


if __name__ == "__main__":
    print(json.dumps(_run(*json.loads(sys.argv[1]))))
