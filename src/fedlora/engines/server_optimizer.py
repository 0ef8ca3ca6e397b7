"""Server optimisers: the mean of a round as a gradient, with the server's own memory.

Hsu et al. Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. 2019 (FedAvgM).
https://arxiv.org/abs/1909.06335
Reddi et al. Adaptive Federated Optimization. ICLR 2021 (FedAdam, FedYogi). https://arxiv.org/abs/2003.00295
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.rounds import Served
from fedlora.types import Layer, Tree


@dataclass(frozen=True)
class ServerOptimizer:
    """The ``[server]`` table: ``x ← x + η m`` (momentum) or ``x + η m / (√v + τ)`` (adam, yogi), leaf by leaf.

    ``Δ`` is the method's result of the round minus the shared leaves before it. ``m = β₁ m + Δ`` for momentum, else
    ``m = β₁ m + (1 − β₁) Δ``; ``v`` is Adam's or Yogi's second moment, from ``τ²``. Neither corrects a bias, as in the
    paper. The moments are leaves whose names begin with ``_``: they stay with the server. A leaf that a round does
    not change (RoLoRA's other factor) keeps its moments, too.
    """

    optimizer: Literal["none", "momentum", "adam", "yogi"] = "none"
    learning_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"server.{key} is {getattr(self, key)}; it lies from 0 to below 1.")
        for key in ("learning_rate", "tau"):
            if not getattr(self, key) > 0:
                raise ValueError(f"server.{key} is {getattr(self, key)}; it must be a positive number.")

    def step(self, before: Tree, served: Served) -> Served:
        """Apply the optimizer to every leaf that the round has changed."""
        if self.optimizer == "none":
            return served
        stepped = {part: dict(layer) for part, layer in served.shared.items()}
        for part, layer in served.shared.items():
            for leaf, x in layer.items():
                if x is not before[part][leaf]:
                    stepped[part] |= self._leaf(leaf, before[part], x - before[part][leaf])
        return served._replace(shared=stepped)

    def _leaf(self, leaf: str, before: Layer, delta: Tensor) -> Layer:
        m = self.beta1 * before.get(f"_m.{leaf}", torch.zeros_like(delta))
        m = m + (delta if self.optimizer == "momentum" else (1 - self.beta1) * delta)
        if self.optimizer == "momentum":
            return {leaf: before[leaf] + self.learning_rate * m, f"_m.{leaf}": m}
        v, square = before.get(f"_v.{leaf}", torch.full_like(delta, self.tau**2)), delta.square()
        if self.optimizer == "adam":
            v = self.beta2 * v + (1 - self.beta2) * square
        else:
            v = v - (1 - self.beta2) * square * (v - square).sign()
        step = self.learning_rate * m / (v.sqrt() + self.tau)
        return {leaf: before[leaf] + step, f"_m.{leaf}": m, f"_v.{leaf}": v}
