"""Whether every engine ends with the same bits: each method, three rounds, a real model, four ways to run it."""

import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.fixtures.memory_grid import MemoryGrid

from fedlora import run
from fedlora.files import load_tree
from fedlora.flower.client_messages import build_simulated_app
from fedlora.flower.client_store import ClientStore
from fedlora.flower.deploy.app_template import write_app
from fedlora.flower.deploy.local import Loopback
from fedlora.methods import METHODS
from fedlora.runs.compare import for_label
from fedlora.runs.config import Config, build
from fedlora.types import Tree

MODEL, CLIENTS, ROUNDS = "minilm-l3-h384-v8k", 3, 3


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Method -> engine -> whether shared leaves, each client's own, base updates and scores are those of one process"""
    torch.set_num_threads(1)
    configs = {name: build(table(models, data, name)) for name in METHODS.names()}
    found: dict[str, dict[str, bool]] = {name: {} for name in configs}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        here = {name: run(config, root / "here" / name) for name, config in configs.items()}
        ends = {
            "grid": ((n, _grid(configs[n], root / "grid" / n)) for n in configs),
            "simulation": ((n, _simulation(configs[n], root / "simulation" / n)) for n in configs),
            "deployment": _deployment(configs, root / "deployment"),
        }
        for engine, results in ends.items():
            for name, (folder, kept) in results:
                found[name][engine] = _same(folder, kept, root / "here" / name, here[name].kept)
                print(json.dumps({name: {engine: found[name][engine]}}), flush=True)
    return found


def table(models: Path, data: Path, name: str) -> dict[str, Any]:
    """The same federation under one method, with the method's own adapter."""
    shared = {
        "rounds": ROUNDS,
        "model": {"name": str(models / MODEL)},
        "task": {"name": "text-classification", "data": str(data / "banking77"), "train_rows": 600, "test_rows": 200},
        "clients": {"count": CLIENTS, "partition": {"name": "dirichlet", "alpha": 0.5}},
        "adapter": {"name": "lora", "rank": 4, "alpha": 8},
        "training": {"local_steps": 3, "learning_rate": 5e-3},
        "evaluation": {"every": ROUNDS},
        "engine": {"threads": 1},
        "flower": {"join_timeout": 300.0},
    }
    return for_label(shared, name)


Ended = tuple[Path, Callable[[int], Tree]]  # a run's folder, and what a client keeps after it


def _grid(config: Config, place: Path) -> Ended:
    from fedlora.flower.serve import run_server

    grid = MemoryGrid(build_simulated_app(config.table, place), {10 + k: {"client": k} for k in range(CLIENTS)})
    run_server(replace(config, flower=replace(config.flower, poll=0.001)), grid, place / "run")
    return place / "run", _own(place / "run", lambda client: place)


def _simulation(config: Config, place: Path) -> Ended:
    result = run(replace(config, engine=replace(config.engine, name="flower-simulation")), place)
    return place, lambda client: result.kept.get(client, {})


def _deployment(configs: dict[str, Config], place: Path) -> Iterable[tuple[str, Ended]]:
    nodes = {f"party-{k}": {"client": k, "state": str(place / str(k)), "engine.threads": 1} for k in range(CLIENTS)}
    with Loopback(nodes, place / "logs") as flower:
        for name, config in configs.items():
            folder = place / name
            if flower.run(write_app(place / f"app-{name}", config, folder), watch=lambda line: None):
                raise ChildProcessError(f"{name}: {flower.outcome}")
            yield name, (folder, _own(folder, lambda client: place / str(client)))


def _own(folder: Path, states: Callable[[int], Path]) -> Callable[[int], Tree]:
    token = json.loads((folder / "run.json").read_text())["run"]
    return lambda client: ClientStore(states(client) / token).load(client).resolve_pending(ROUNDS - 1).kept


def _same(folder: Path, kept: Callable[[int], Tree], here: Path, ours: Any) -> bool:
    names = [
        "shared.safetensors",
        *(["base_update.safetensors"] if (here / "base_update.safetensors").exists() else []),
    ]
    trees = [(load_tree(folder / name), load_tree(here / name)) for name in names]
    trees += [(_trained(kept(client)), _trained(tree)) for client, tree in ours.items()]
    ends = [json.loads((place / "summary.json").read_text())["final"] for place in (folder, here)]
    return all(_equal(a, b) for a, b in trees) and _close(*ends)


def _close(a: Any, b: Any) -> bool:
    """Equal but for the last digits of a loss on test rows, which depend on the rows that are computed together."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    return math.isclose(a, b, rel_tol=1e-5) if isinstance(a, float) and isinstance(b, float) else bool(a == b)


def _trained(tree: Tree) -> Tree:
    return {part: layer for part, layer in tree.items() if layer}


def _equal(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(
        a[p].keys() == b[p].keys() and all(torch.equal(x, b[p][leaf]) for leaf, x in a[p].items()) for p in a
    )
