"""Rescale: a pair of factors with the honest product that harms a mean of factors.

Ours. ``A`` and ``B`` are defined only up to ``(B T, T⁻¹ A)``, so no check of the product detects it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.security.attacks._base import Attack
from fedlora.seeds import derive_seed
from fedlora.types import Layer, Turn


@dataclass(frozen=True)
class Rescale(Attack):
    """``(B T, T⁻¹ A)`` with ``T = scale · I``, or (``how = "rotate"``) a random orthogonal ``T`` for each turn.

    A layer with one factor in the upload stays unchanged.
    """

    how: Literal["scale", "rotate"] = "scale"
    scale: float = 100.0

    def __post_init__(self):
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"attack.scale is {self.scale}; a factor is rescaled by a positive number.")

    def check(self, method, task, hidden):
        if not isinstance(method.adapter, LoRA):
            raise ValueError(
                f"attack.name is 'rescale', which needs a pair of LoRA factors, and {method.title} trains "
                f"{type(method.adapter).__name__}; take another attack or method."
            )

    def alter(self, rules, start, sent, turn):
        return {
            part: self._reframe(layer, part, turn)
            if isinstance(rules[part].adapter, LoRA) and len(layer) == 2
            else layer
            for part, layer in sent.items()
        }

    def _reframe(self, layer: Layer, part: str, turn: Turn) -> dict[str, Tensor]:
        if self.how == "scale":
            return {"A": layer["A"] / self.scale, "B": layer["B"] * self.scale}
        r = layer["A"].shape[-2]
        draws = torch.Generator().manual_seed(derive_seed(turn.seed, "frame", part))
        T = torch.linalg.qr(torch.randn(r, r, generator=draws))[0].to(layer["A"])
        return {"A": T.mT @ layer["A"], "B": layer["B"] @ T}
