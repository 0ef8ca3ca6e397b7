"""Ravan's adapter: many small heads between fixed outer factors.

Raje et al. Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning. NeurIPS 2025.
https://arxiv.org/abs/2506.05568
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapters._base import Adapter, check_positive, generator
from fedlora.schema import ConfigError
from fedlora.types import Factors, Layer

Basis = Literal["gram_schmidt", "normal", "constant", "shared_subspace"]


@dataclass(frozen=True)
class MultiHead(Adapter):
    """``ΔW = Σ_i s_i B_i H_i A_i``; ``B_i (m r)``, ``A_i (r n)`` frozen, ``H_i (r r)`` from 0 and ``s_i`` from 1.

    Leaves: ``A (h·r n)`` and ``B (m h·r)`` hold the heads' outer factors side by side, so that the forward pass is
    one GEMM, one batched ``r × r`` product and one GEMM. ``head_rank`` None: as many trainable numbers as a LoRA of
    rank ``lora_rank`` has on the same weight, ``r = ⌊√((m + n) · lora_rank / heads)⌋``.
    """

    cite = """@inproceedings{raje2025ravan, title = {{Ravan}: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning},
      author = {Raje and others}, booktitle = {NeurIPS}, year = {2025}, eprint = {2506.05568},
      archiveprefix = {arXiv}}"""

    heads: int = 4
    head_rank: int | None = None
    lora_rank: int = 8
    basis: Basis = "gram_schmidt"

    inputs = frozenset()

    def __post_init__(self) -> None:
        check_positive(self, "heads", "head_rank", "lora_rank")

    @property
    def cores(self) -> tuple[str, ...]:
        return tuple(f"H{i}" for i in range(self.heads))

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(f"s{i}" for i in range(self.heads))

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset(self.cores + self.scales)

    @property
    def budget(self) -> int:
        return self.heads

    @classmethod
    def like(cls, other: "Adapter") -> "Adapter":
        return other if isinstance(other, cls) else cls(lora_rank=getattr(other, "rank", 8))

    def size(self, m: int, n: int) -> int:
        """``r``: the side of one head's core."""
        return self.head_rank or max(1, int(((m + n) * self.lora_rank / self.heads) ** 0.5))

    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        r = self.size(m, n)
        A, B = _outer(self.basis, self.heads, r, m, n, seed)
        cores: dict[str, Tensor] = {core: torch.zeros(r, r) for core in self.cores}
        # (1, 1) rather than a scalar: a scale then broadcasts over its core under any leading dimensions.
        return {"A": A, "B": B, **cores, **{scale: torch.ones(1, 1) for scale in self.scales}}

    def _blocks(self, layer: Layer) -> Tensor:  # * h r r
        return torch.stack([layer[f"s{i}"] * layer[f"H{i}"] for i in range(self.heads)], dim=-3)

    def delta(self, layer: Layer) -> Factors:
        blocks = self._blocks(layer)
        *stack, h, r, _ = blocks.shape
        A = layer["A"].reshape(*layer["A"].shape[:-2], h, r, -1)
        return Factors(layer["B"], (blocks @ A).reshape(*stack, h * r, -1))

    def forward(self, x: Float[Tensor, "*batch n"], layer: Layer) -> Float[Tensor, "*batch m"]:
        blocks = self._blocks(layer)
        h, r, _ = blocks.shape
        y = (x @ layer["A"].mT).reshape(-1, h, r).transpose(0, 1)  # h batch r
        y = torch.bmm(y, blocks.to(y.dtype).mT).transpose(0, 1)
        return torch.matmul(y.reshape(*x.shape[:-1], h * r), layer["B"].mT)


def _orthonormal(rows: int, columns: int, draws: torch.Generator) -> Tensor:
    """``columns`` orthonormal columns: what Gram-Schmidt makes of normal draws."""
    Q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=draws))[0]
    return Q


def _outer(basis: Basis, heads: int, r: int, m: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = generator(seed)
    wide = heads * r
    if basis == "gram_schmidt":
        if wide > min(m, n):
            room = min(m, n) // heads
            fitting = f"adapter.head_rank to at most {room}" if room else f"adapter.heads to at most {min(m, n)}"
            raise ConfigError(
                f"Ravan's gram_schmidt basis needs heads * head_rank <= min(m, n), but {heads} * {r} = {wide} is more "
                f'than {min(m, n)} for a weight of {m} x {n}; set {fitting}, or adapter.basis to "normal".'
            )
        return _orthonormal(n, wide, draws).mT.contiguous(), _orthonormal(m, wide, draws)
    if basis == "normal":  # variance 1/n and 1/m; unit variance would be about m·n too large in the product
        return torch.randn(wide, n, generator=draws) * n**-0.5, torch.randn(m, wide, generator=draws) * m**-0.5
    if basis == "constant":  # every head has the same outer factors
        A, B = torch.randn(r, n, generator=draws) * n**-0.5, torch.randn(m, r, generator=draws) * m**-0.5
        return A.repeat(heads, 1), B.repeat(1, heads)
    # shared_subspace: the heads' factors differ, but lie in one r-dimensional space a side
    A, B = _orthonormal(n, r, draws).mT, _orthonormal(m, r, draws)
    turns = torch.randn(2, heads, r, r, generator=draws) * r**-0.5
    return (turns[0] @ A).reshape(wide, n), (B @ turns[1]).transpose(0, 1).reshape(m, wide)
