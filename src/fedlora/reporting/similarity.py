"""How alike what clients hold is, weight by weight: the question behind sharing ``A`` and keeping ``B``.

Guo et al. Selective Aggregation for Low-Rank Adaptation in Federated Learning. ICLR 2025, section 3.
https://arxiv.org/abs/2410.01463
"""

from collections.abc import Mapping, Sequence
from math import degrees
from pathlib import Path

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.linalg.geometry import mean_cosine, mean_principal_angle
from fedlora.runs.config import ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.seeds import derive_seed
from fedlora.types import Layer


def similarity(folder: str | Path) -> dict[str, dict[str, float]]:
    """Weight -> figures over all pairs of a finished run's clients.

    ``A`` and ``B``: mean cosine between two clients' factors as they are. ``A change``: the same of ``A - A_0``, since
    all clients start from one ``A_0`` and would be alike if nobody moved (``B_0`` is zero, so ``B`` is its own change).
    ``A angle`` and ``B angle``: mean principal angle between row spaces of ``A`` and column spaces of ``B``, degrees.
    ``ConfigError`` where the clients hold one model, another adapter than LoRA, or different ranks.
    """
    run = RunFolder.open(folder)
    adapter, config = run.config.method.adapter, run.config
    if not isinstance(adapter, LoRA):
        raise ConfigError(
            "similarity is of LoRA's A and B; this run's adapter has neither: set adapter.name to 'lora'."
        )
    if not config.method.personal:
        raise ConfigError(
            f"the clients of a {config.method.title} run all hold the shared model; "
            "look at a run whose clients keep their own, such as method.name = 'local'."
        )
    trees = [run.tree(client) for client in run.clients()]
    if len(trees) < 2:
        raise ConfigError(f"{str(folder)!r} has {len(trees)} client; similarity needs 2.")
    parts = [part for part in run.shared if set(trees[0][part]) == {"A", "B"}]
    return {part: _of_weight([tree[part] for tree in trees], _start(run, part, trees[0][part])) for part in parts}


def _start(run: RunFolder, part: str, like: Layer) -> Tensor | None:
    """``A_0``, which comes from the seed; None where adapters began with something else."""
    if run.config.model.start is not None:
        return None
    m, n = like["B"].shape[0], like["A"].shape[1]
    return run.config.method.adapter.init(m, n, derive_seed(run.config.seed, "adapter", part))["A"]


def _of_weight(layers: Sequence[Layer], start: Tensor | None) -> dict[str, float]:
    if len({tuple(layer["A"].shape) for layer in layers}) > 1:
        raise ConfigError("the clients differ in rank, and factors of different ranks cannot be compared.")
    A, B = (torch.stack([layer[leaf].double() for layer in layers]) for leaf in "AB")
    angles = {f"{leaf} angle": degrees(mean_principal_angle(x)) for leaf, x in (("A", A.mT), ("B", B))}
    found = {"A": float(mean_cosine(A.unbind())), "B": float(mean_cosine(B.unbind())), **angles}
    return found if start is None else {**found, "A change": float(mean_cosine((A - start.double()).unbind()))}


def means(weights: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Every figure's mean over the weights."""
    names = next(iter(weights.values()))
    return {name: sum(row[name] for row in weights.values()) / len(weights) for name in names}
