"""Cosine similarity of the clients' factors, weight by weight: the question behind sharing ``A`` and keeping ``B``.

Guo et al. Selective Aggregation for Low-Rank Adaptation in Federated Learning. ICLR 2025, section 3.
https://arxiv.org/abs/2410.01463
"""

from collections.abc import Mapping, Sequence
from math import degrees
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.linalg.geometry import mean_cosine, mean_principal_angle
from fedlora.runs.folder import RunFolder
from fedlora.runs.table import Column, Table
from fedlora.schema import ConfigError
from fedlora.seeds import derive_seed
from fedlora.types import Layer


def measure_similarity(folder: str | Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Measure a finished run over all pairs of clients; returns weight -> figures, and their means over the weights.

    ``A`` and ``B``: mean cosine between two clients' factors. ``A change``: the same of ``A - A_0``, since all clients
    start from one ``A_0`` and would be alike without training (``B_0`` is zero, so ``B`` is its own change).
    ``A angle`` and ``B angle``: mean principal angle between row spaces of ``A`` and column spaces of ``B``, degrees.
    Raises ``ConfigError`` if the clients hold one model, another adapter than LoRA, or different ranks.
    """
    run = RunFolder.open(folder)
    adapter, config = run.config.method.adapter, run.config
    if not isinstance(adapter, LoRA):
        raise ConfigError("similarity is of LoRA's A and B; this run's adapter has none: set adapter.name to 'lora'.")
    if not config.method.personal:
        raise ConfigError(
            f"the clients of a {config.method.title} run all hold the shared model; "
            "name a run whose clients keep their own, such as method.name = 'local'."
        )
    trees = [run.tree(client) for client in run.clients()]
    if len(trees) < 2:
        raise ConfigError(f"{str(folder)!r} has {len(trees)} client; similarity needs 2.")
    parts = [part for part in run.shared if set(trees[0][part]) == {"A", "B"}]
    weights = {}
    for part in parts:
        start = None  # the adapters had a warm start
        if config.model.start is None:
            m, n = trees[0][part]["B"].shape[0], trees[0][part]["A"].shape[1]
            start = adapter.init(m, n, derive_seed(config.seed, "adapter", part))["A"]
        weights[part] = _measure_weight([tree[part] for tree in trees], start)
    names = next(iter(weights.values()))
    return weights, {name: sum(row[name] for row in weights.values()) / len(weights) for name in names}


def _measure_weight(layers: Sequence[Layer], start: Tensor | None) -> dict[str, float]:
    if len({tuple(layer["A"].shape) for layer in layers}) > 1:
        raise ConfigError("the clients differ in rank, and factors of different ranks cannot be compared.")
    A, B = (torch.stack([layer[leaf].double() for layer in layers]) for leaf in "AB")
    angles = {f"{leaf} angle": degrees(mean_principal_angle(x)) for leaf, x in (("A", A.mT), ("B", B))}
    found = {"A": float(mean_cosine(A.unbind())), "B": float(mean_cosine(B.unbind())), **angles}
    return found if start is None else {**found, "A change": float(mean_cosine((A - start.double()).unbind()))}


def tabulate_similarity(weights: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]) -> list[Table | str]:
    """Build the table of the similarity of the clients' factors, with an explanation."""
    rows: list[dict[str, Any]] = [{"weight": part, **row} for part, row in [*weights.items(), ("mean", mean)]]
    figures = (
        Column(name, f"{name}, degrees", 1) if name.endswith("angle") else Column(name, name, 3) for name in mean
    )
    title = "Likeness of the clients' factors, mean over pairs of clients"
    return [
        Table("similarity", title, (Column("weight", "weight"), *figures), rows),
        "A, B: cosine of the factors as they are. A change: cosine of what training added to the common start.",
    ]
