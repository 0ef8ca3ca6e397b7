"""Ravan: many small heads with fixed outer factors; a client trains as many as it can afford.

Raje et al. Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning. NeurIPS 2025.
https://arxiv.org/abs/2506.05568

Use it when clients differ in what they can afford (each trains as many heads as it can), or updates should be linear
in what is trained, at the bytes of a LoRA.
Not when the result must be a small plain LoRA (an export has the rank of all heads together), or clients train
different heads and rounds must still be exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import MultiHead
from fedlora.adapters._base import generator
from fedlora.methods._base import Method, pick
from fedlora.types import Layer, Turn, Work


@dataclass(frozen=True)
class Ravan(Method):
    """``ΔW = Σ_i s_i B_i H_i A_i``; clients send ``s_i H_i``, the server takes each head's mean over its trainers.

    ``s_i H_i`` is linear in the update, so each head's mean is exact over those who trained it. Where clients train
    different heads, the sum of these means is not the mean of the clients' updates. ``s_i`` starts at 1 each round,
    because the server never sends one.
    """

    adapter: MultiHead = field(default_factory=MultiHead)
    weighting: Literal["examples", "uniform"] = "uniform"
    score: Literal["random", "weight", "gradient"] = "random"
    train_scales: bool = True

    title = "Ravan"
    cite = """@inproceedings{raje2025ravan, title = {{Ravan}: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning},
      author = {Raje and others}, booktitle = {NeurIPS}, year = {2025}, eprint = {2506.05568},
      archiveprefix = {arXiv}}"""
    adapters = (MultiHead,)
    exact = True
    any_rank = True

    @property
    def uses_gradient(self) -> bool:
        return self.score == "gradient"

    def trains(self, start: Layer, turn: Turn, gradient: Callable[[], Layer]) -> frozenset[str]:
        cores, kinds = self.adapter.cores, "Hs" if self.train_scales else "H"
        if turn.rank >= len(cores) and not self.uses_gradient:  # all of them, whatever the draws
            return frozenset(f"{kind}{core[1:]}" for core in cores for kind in kinds)
        draws = torch.rand(len(cores), generator=generator(turn.seed), dtype=torch.float64)  # breaks ties
        scores = draws if self.score == "random" else _norms(gradient() if self.uses_gradient else start, cores, draws)
        chosen = scores.topk(turn.rank).indices.tolist()
        return frozenset(f"{kind}{i}" for i in chosen for kind in kinds)

    def send(self, work: Work, turn: Turn) -> Layer:
        heads = [core[1:] for core in sorted(work.trained) if core.startswith("H")]
        return {f"H{i}": work.end[f"s{i}"] * work.end[f"H{i}"] for i in heads}

    def keep(self, work: Work, sent: Layer, turn: Turn) -> Layer:
        return pick(work.end, frozenset())  # the scales went up inside the cores


def _norms(layer: Layer, cores: Sequence[str], draws: Tensor) -> Tensor:
    """Frobenius norms of the heads' cores, in float64, with ties broken by a seeded draw."""
    norms = torch.stack([layer[core].double().norm().cpu() for core in cores])
    return norms + draws * norms.max() * 1e-9 if norms.max() > 0 else draws
