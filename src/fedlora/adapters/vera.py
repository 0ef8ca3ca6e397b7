"""VeRA: one frozen random pair for all weights, and two trained vectors a weight.

Kopiczko et al. VeRA: Vector-based Random Matrix Adaptation. ICLR 2024. https://arxiv.org/abs/2310.11454
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapters._base import Adapter, check_positive, generator, uniform
from fedlora.types import Factors, Layer


@dataclass(frozen=True)
class VeRA(Adapter):
    """``ΔW = diag(b) B diag(d) A``; ``A (r n)``, ``B (m r)`` frozen from one seed, ``d (r)``, ``b (m)`` trained."""

    cite = """@inproceedings{kopiczko2024vera, title = {{VeRA}: Vector-based Random Matrix Adaptation},
      author = {Kopiczko and others}, booktitle = {ICLR}, year = {2024}, eprint = {2310.11454},
      archiveprefix = {arXiv}}"""

    rank: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0

    inputs = frozenset({"d"})
    outputs = frozenset({"b"})

    def __post_init__(self) -> None:
        check_positive(self, "rank")
        if not 0 < abs(self.d_initial) < math.inf:
            raise ValueError(f"adapter.d_initial is {self.d_initial}; from 0 nothing would be trained.")

    @property
    def budget(self) -> int:
        return self.rank

    @classmethod
    def like(cls, other: "Adapter") -> "Adapter":
        return other if isinstance(other, cls) else cls()

    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        A, B = _projections(m, n, self.rank, self.projection_seed)
        return {"A": A, "B": B, "d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(m)}

    def delta(self, layer: Layer) -> Factors:
        return Factors(layer["b"][..., :, None] * layer["B"], layer["d"][..., :, None] * layer["A"])

    def forward(self, x: Float[Tensor, "*batch n"], layer: Layer) -> Float[Tensor, "*batch m"]:
        # The vectors act on the activations: an (m r) product a step would cost more than the two GEMMs.
        return (((x @ layer["A"].mT) * layer["d"]) @ layer["B"].mT) * layer["b"]

    def leading(self, layer: Layer, rank: int) -> Layer:
        return {
            "A": layer["A"][..., :rank, :],
            "B": layer["B"][..., :rank],
            "d": layer["d"][..., :rank],
            "b": layer["b"],
        }


@lru_cache(maxsize=64)
def _projections(m: int, n: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The pair that all weights of one shape share: the same two tensors, not copies of them."""
    draws = generator(seed)
    return uniform((rank, n), (6 / n) ** 0.5, draws), uniform((m, rank), (6 / rank) ** 0.5, draws)
