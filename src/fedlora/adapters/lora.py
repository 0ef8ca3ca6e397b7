"""LoRA and rsLoRA: ``ΔW = s B A``.

Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022. https://arxiv.org/abs/2106.09685
Kalajdzievski. A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. 2023. https://arxiv.org/abs/2312.03732
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedlora.adapters._base import Adapter, check_alpha, check_positive, generator, uniform
from fedlora.linalg.factors import truncate
from fedlora.linalg.sums import Term
from fedlora.types import Factors, Layer

CITE = """@inproceedings{hu2022lora, title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Hu and others}, booktitle = {ICLR}, year = {2022}, eprint = {2106.09685}, archiveprefix = {arXiv}}"""
CITE_RS = """@misc{kalajdzievski2023rslora, title = {A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}},
  author = {Kalajdzievski}, year = {2023}, eprint = {2312.03732}, archiveprefix = {arXiv}}"""


@dataclass(frozen=True)
class LoRA(Adapter):
    """``ΔW = s B A`` with ``A (r n)``, ``B (m r)`` and ``s = alpha / r`` (rsLoRA: ``alpha / √r``)."""

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False

    inputs = frozenset({"A"})
    outputs = frozenset({"B"})

    def __post_init__(self) -> None:
        check_positive(self, "rank")
        check_alpha(self.alpha)

    @property
    def cite(self) -> str:  # type: ignore[override]
        return CITE + ("\n" + CITE_RS if self.use_rslora else "")

    @property
    def budget(self) -> int:
        return self.rank

    @classmethod
    def like(cls, other: "Adapter") -> "Adapter":
        return other if isinstance(other, cls) else cls(rank=getattr(other, "lora_rank", 8))

    def scale(self, rank: int) -> float:
        """Return ``s`` for a layer of this rank; it depends on the client's rank."""
        return self.alpha / (rank**0.5 if self.use_rslora else rank)

    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        # PEFT's and the paper's authors' start: A uniform with bound 1/√n (Kaiming with a = √5), B zero.
        return {"A": uniform((self.rank, n), n**-0.5, generator(seed)), "B": torch.zeros(m, self.rank)}

    def delta(self, layer: Layer) -> Factors:
        return Factors(self.scale(layer["A"].shape[-2]) * layer["B"], layer["A"])

    def forward(self, x: Float[Tensor, "*batch n"], layer: Layer) -> Float[Tensor, "*batch m"]:
        A, B = layer["A"], layer["B"]
        return ((x @ A.mT) @ B.mT) * self.scale(A.shape[-2])

    def term(self, layer: Layer, weight: float) -> Term:
        return Term(weight * self.scale(layer["A"].shape[-2]), layer["B"], layer["A"])

    def split(self, f: Factors) -> Layer:
        """Return the leaves whose update is ``f``: the inverse of ``delta``."""
        return {"A": f.V, "B": f.U / self.scale(f.V.shape[-2])}

    def around(self, update: Factors, fresh: Layer) -> Layer:
        update = truncate(update, self.rank) if update.V.shape[-2] > self.rank else update
        leaves, q = self.split(update), update.V.shape[-2]
        # Ranks that the update does not need begin as they would without it: A drawn, B zero.
        ratio = self.scale(q) / self.scale(self.rank)
        A = torch.cat([leaves["A"], fresh["A"][..., q:, :]], dim=-2)
        return {"A": A, "B": torch.cat([ratio * leaves["B"], fresh["B"][..., q:]], dim=-1)}

    def leading(self, layer: Layer, rank: int) -> Layer:
        present = layer["A"].shape[-2]
        if rank >= present:
            return layer
        # Each rank has a scale of its own, and the update is what must stay.
        B = layer["B"][..., :rank] * (self.scale(present) / self.scale(rank))
        return {**layer, "A": layer["A"][..., :rank, :], "B": B}

    def pad(self, layer: Layer, rank: int) -> Layer:
        """Pad the factors with zeros to a larger rank, or cut them to a smaller one; the scale is adapted."""
        A, B = layer["A"], layer["B"]
        if A.shape[-2] == rank:
            return layer
        more = rank - A.shape[-2]
        wider = functional.pad(B * (self.scale(A.shape[-2]) / self.scale(rank)), (0, more))
        return {**layer, "A": functional.pad(A, (0, 0, 0, more)), "B": wider}
