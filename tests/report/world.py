"""Folders of runs as fedlora leaves them, made up: their figures are known, and nothing is trained."""

import json
from pathlib import Path
from typing import Any

import tomli_w

METHODS = ("fedit", "svd", "local")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`&</script>"


def value(method: int, seed: int, round: int) -> float:
    """The shared model's accuracy: what a test can work out by itself."""
    return 0.5 + 0.1 * method + 0.01 * seed + 0.02 * round


def record(method: int, seed: int, round: int, clients: int, parts: int = 2) -> dict[str, Any]:
    """A round as ``metrics.jsonl`` has it; of 1,000,000 bytes up a round, and 2 seconds."""
    own = [value(method, seed, round) - 0.001 * k for k in range(clients)]
    weights = {
        f"vit.layers.{i}.q": {
            "served": 0.1 * (i + 1) / round, "fedit": 0.2 / round, "best": 0.05 / round, "drift": 1.0,
            "likeness A": 0.9, "likeness B": 0.3,
        }
        for i in range(parts)
    }  # fmt: skip
    return {
        "round": round, "cohort": list(range(clients)), "loss": dict.fromkeys(map(str, range(clients)), 1.0),
        "weights": weights, "global": {"accuracy": value(method, seed, round), "loss": 1.0},
        "clients": {"mean": sum(own) / clients, "worst": own[-1], "worst_client": clients - 1, "each": own},
        "bytes": {"up": {"adapter": 750_000, "head": 250_000}, "down": {"adapter": 500_000}},
        "seconds": {"train": 1.0, "combine": 0.25, "measure": 0.25, "evaluate": 0.25, "total": 2.0},
    }  # fmt: skip


def config(method: str, seed: int, rounds: int, clients: int) -> dict[str, Any]:
    """The resolved configuration, as far as a report reads it."""
    return {
        "rounds": rounds, "seed": seed, "model": {"name": "demo-vit"}, "method": {"name": method},
        "task": {"name": "image-classification", "data": "digits"}, "adapter": {"name": "lora", "rank": 4},
        "clients": {"count": clients, "split": {"name": "dirichlet", "alpha": 0.3}},
        "training": {"local_steps": 10},
    }  # fmt: skip


def write_run(
    folder: Path, method: str = "fedit", seed: int = 0, rounds: int = 3, clients: int = 3, parts: int = 2,
    ended: bool = True, more: dict[str, Any] | None = None, number: int | None = None,
) -> Path:  # fmt: skip
    """A run's folder. ``more`` is laid over each record; ``ended`` False leaves it under way, in the midst of a line."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(config(method, seed, rounds + (not ended), clients)))
    place = METHODS.index(method) if number is None else number
    with open(folder / "metrics.jsonl", "w") as file:
        for round in range(1, rounds + 1):
            file.write(json.dumps({**record(place, seed, round, clients, parts), **(more or {})}) + "\n")
        file.write("" if ended else '{"round": 99, "coh')
    rows = {str(k): {"train": 10 + k, "test": 5, "labels": [10, k]} for k in range(clients)}
    (folder / "rows.json").write_text(json.dumps({"labels": ["cat", "dog"], "clients": rows}))
    if ended:
        (folder / "summary.json").write_text(json.dumps(summary(method, seed, rounds)))
    return folder


def summary(method: str, seed: int, rounds: int) -> dict[str, Any]:
    """What a run's end leaves."""
    return {
        "method": method, "personal": method == "local", "metric": {"name": "accuracy", "higher": True}, "seed": seed,
        "rounds": rounds, "interrupted": False, "versions": {"fedlora": "0.1.0"}, "machine": {"device": "cpu"},
    }  # fmt: skip


def write_comparison(folder: Path, methods=METHODS, seeds=(0, 1, 2), ended: bool = True, **run: Any) -> Path:
    """A comparison's folder."""
    cells = []
    for method in methods:
        for seed in seeds:
            place = write_run(folder / f"{method}-seed{seed}", method, seed, **run)
            cells.append({"label": method, "seed": seed, "folder": f"elsewhere/{place.name}", "failure": None})
    if ended:
        (folder / "comparison.json").write_text(json.dumps({"rows": [], "runs": cells}))
    return folder
