"""Two LoRAs side by side: one that is shared, and one that stays with its client.

Yang et al. Dual-Personalizing Adapter for Federated Foundation Models. NeurIPS 2024. https://arxiv.org/abs/2403.19211
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapters._base import Adapter, check_alpha, check_positive, generator, uniform
from fedlora.types import Factors, Layer


@dataclass(frozen=True)
class DualLoRA(Adapter):
    """``ΔW = s (B A + B_own A_own)``, ``s = alpha / r`` (rsLoRA: ``alpha / √r``), both pairs of rank ``rank``."""

    cite = """@inproceedings{yang2024feddpa, title = {Dual-Personalizing Adapter for Federated Foundation Models},
      author = {Yang and others}, booktitle = {NeurIPS}, year = {2024}, eprint = {2403.19211},
      archiveprefix = {arXiv}}"""

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False

    own = frozenset({"A_own", "B_own"})  # the pair that never leaves its client

    inputs = frozenset({"A", "A_own"})
    outputs = frozenset({"B", "B_own"})

    def __post_init__(self) -> None:
        check_positive(self, "rank")
        check_alpha(self.alpha)

    @property
    def budget(self) -> int:
        return self.rank

    @classmethod
    def like(cls, other: "Adapter") -> "Adapter":
        if isinstance(other, cls):
            return other
        return cls(getattr(other, "rank", 8), getattr(other, "alpha", 16.0), getattr(other, "use_rslora", False))

    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        draws = generator(seed)
        A, A_own = (uniform((self.rank, n), n**-0.5, draws) for _ in range(2))
        return {"A": A, "A_own": A_own, "B": torch.zeros(m, self.rank), "B_own": torch.zeros(m, self.rank)}

    @property
    def scale(self) -> float:
        """``s``, of both pairs."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def delta(self, layer: Layer) -> Factors:
        U = torch.cat([layer["B"], layer["B_own"]], dim=-1)
        return Factors(self.scale * U, torch.cat([layer["A"], layer["A_own"]], dim=-2))

    def forward(self, x: Float[Tensor, "*batch n"], layer: Layer) -> Float[Tensor, "*batch m"]:
        shared, private = ((x @ layer[a].mT) @ layer[b].mT for a, b in (("A", "B"), ("A_own", "B_own")))
        return (shared + private) * self.scale
