"""fedlora's defaults against the loop as people write it (float32, every row padded to 128), lever by lever.

Each point is a process of its own, because the allocator's setting holds for a whole process; points take turns.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPEATS = 3
MODELS = {"minilm-l6-h384": 12, "stories260k-llama": 60}  # model -> steps timed
LEVERS = {  # cumulative, in this order
    "as people write it": (True, False, "system", "float32"),
    "+ padding to the longest row": (False, False, "system", "float32"),
    "+ rows of like length together": (False, True, "system", "float32"),
    "+ allocator": (False, True, "keep", "float32"),
    "+ bf16 frozen base (fedlora's defaults)": (False, True, "keep", "auto"),
}
SEEDS, LEARN_STEPS, LEARN_RATE = (0, 1, 2), 250, 5e-3


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Samples a second of every point, medians over turns; and accuracy of both ends over seeds."""
    found: dict[str, Any] = {}
    for model, steps in MODELS.items():
        rates: dict[str, list[float]] = {name: [] for name in LEVERS}
        for _ in range(REPEATS):
            for name, lever in LEVERS.items():
                rates[name].append(_child(models / model, data, lever, steps, 0)["rate"])
        first = rates["as people write it"]
        found[model] = {
            name: {
                "samples a second": round(statistics.median(own), 1),
                "times as fast": round(statistics.median(a / b for a, b in zip(own, first)), 2),
            }
            for name, own in rates.items()
        }
    ends = (next(iter(LEVERS)), list(LEVERS)[-1])
    found["accuracy on minilm-l6-h384"] = {
        name: [
            round(_child(models / "minilm-l6-h384", data, LEVERS[name], LEARN_STEPS, s, True)["accuracy"], 4)
            for s in SEEDS
        ]
        for name in ends
    }
    return found


def _child(model: Path, data: Path, lever: tuple, steps: int, seed: int, score: bool = False) -> dict[str, float]:
    asked = json.dumps([str(model), str(data / "banking77"), lever, steps, seed, score])
    out = subprocess.run([sys.executable, "-m", "benchmarks.levers", asked], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def _run(model: str, data: str, lever: tuple, steps: int, seed: int, score: bool) -> dict[str, float]:
    import time

    from fedlora.runs.config import build
    from fedlora.tasks.metrics.scores import compute_metrics
    from fedlora.training.evaluation import Evaluator
    from fedlora.training.local import LocalTrainer

    pad, group, allocator, precision = lever
    config = build(
        {
            "seed": seed,
            "rounds": 1,
            "model": {"name": model},
            "task": {"name": "text-classification", "data": data, "pad_to_max_length": pad, "test_rows": 1000},
            "clients": {"count": 1},
            "adapter": {"name": "lora", "rank": 8, "alpha": 16},
            "training": {
                "local_steps": steps,
                "group_by_length": group,
                "precision": precision,
                "learning_rate": LEARN_RATE,
            },
            "engine": {"device": "cpu", "threads": 1, "allocator": allocator},
        }
    )
    f = config.federation()
    start, trained = f.model.initial(seed), {part: rule.adapter.trainable for part, rule in f.rules.items()}

    def fit():
        return LocalTrainer(f.model, f.task, f.data.train, f.shards[0], f.training, f.turn(0, 0), 1).fit(
            start, trained, f.rules
        )

    if not score:
        fit()  # warms up
    began = time.perf_counter()
    end = fit()
    rate = steps * f.training.batch_size / (time.perf_counter() - began)
    found = {"rate": rate}
    if score:
        found["accuracy"] = compute_metrics(Evaluator(f.model, f.task, f.data.test, f.shards).score_all(end))[
            "accuracy"
        ]
    return found


if __name__ == "__main__":
    print(json.dumps(_run(*json.loads(sys.argv[1]))))
