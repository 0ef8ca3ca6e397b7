"""Gaussian: noise instead of an update.

Blanchard et al. Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
https://arxiv.org/abs/1703.02757
"""

from dataclasses import dataclass

import torch

from fedlora.security.attacks._base import Attack
from fedlora.security.robust.krum import Krum
from fedlora.seeds import derive_seed


@dataclass(frozen=True)
class Gaussian(Attack):
    """Replaces each leaf's change by normal noise with ``scale`` times its norm."""

    cite = Krum.cite

    scale: float = 3.0

    def alter(self, rules, start, sent, turn):
        forged: dict[str, dict[str, torch.Tensor]] = {part: {} for part in sent}
        for part, layer in sent.items():
            for leaf, x in layer.items():
                before, seed = start[part][leaf], derive_seed(turn.seed, "noise", part, leaf)
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
                forged[part][leaf] = before + self.scale * (x - before).norm() * noise / noise.norm()
        return forged
