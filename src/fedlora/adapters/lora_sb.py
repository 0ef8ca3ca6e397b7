"""LoRA-SB: a small square core between two frozen, orthonormal factors.

Ponkshe et al. Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning. 2024. https://arxiv.org/abs/2411.19557
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapters._base import Adapter, check_positive, generator
from fedlora.linalg.sums import exact_svd
from fedlora.types import Factors, Layer


@dataclass(frozen=True)
class LoRASB(Adapter):
    """``ΔW = B R A`` with ``A (r n)`` and ``B (m r)`` frozen and orthonormal; only ``R (r r)`` is trained, from 0.

    ``core_rank`` None: as many trainable numbers as a LoRA of rank ``lora_rank`` has, ``r = ⌊√((m + n) lora_rank)⌋``,
    and at most ``min(m, n)``.
    """

    cite = """@misc{ponkshe2024lorasb,
      title = {Initialization using Update Approximation is a Silver Bullet for
        Extremely Efficient Low-Rank Fine-Tuning},
      author = {Ponkshe and others}, year = {2024}, eprint = {2411.19557}, archiveprefix = {arXiv}}"""

    core_rank: int | None = None
    lora_rank: int = 8

    inputs = frozenset()
    outputs = frozenset({"R"})

    def __post_init__(self) -> None:
        check_positive(self, "core_rank", "lora_rank")

    @property
    def budget(self) -> int:
        return self.core_rank or self.lora_rank

    @classmethod
    def like(cls, other: "Adapter") -> "Adapter":
        return other if isinstance(other, cls) else cls(lora_rank=getattr(other, "rank", 8))

    def size(self, m: int, n: int) -> int:
        """``r``: the side of the core."""
        if self.core_rank is not None and self.core_rank > min(m, n):
            raise ValueError(
                f"adapter.core_rank is {self.core_rank}, more than {min(m, n)}, the smaller side of a weight of "
                f"{m} x {n}; lower it."
            )
        return self.core_rank or min(m, n, int(((m + n) * self.lora_rank) ** 0.5))

    def init(self, m: int, n: int, seed: int) -> dict[str, Tensor]:
        r, draws = self.size(m, n), generator(seed)
        A = torch.linalg.qr(torch.randn(n, r, generator=draws)).Q.mT.contiguous()
        B = torch.linalg.qr(torch.randn(m, r, generator=draws)).Q
        return {"A": A, "B": B, "R": torch.zeros(r, r)}

    def around(self, update: Factors, fresh: Layer) -> Layer:
        # The update's leading singular vectors outside, its values in the core; what is missing is drawn, with zeros.
        P, S, Q = exact_svd(update, fresh["R"].shape[-1])
        B = torch.linalg.qr(torch.cat([P, fresh["B"]], dim=-1)).Q[..., : fresh["B"].shape[-1]]
        A = torch.linalg.qr(torch.cat([Q, fresh["A"].mT], dim=-1)).Q[..., : fresh["A"].shape[-2]].mT
        core = (B.mT @ P) @ torch.diag_embed(S) @ (Q.mT @ A.mT)  # QR may turn the signs
        return {"A": A.contiguous(), "B": B, "R": core}

    def delta(self, layer: Layer) -> Factors:
        return Factors(layer["B"], layer["R"] @ layer["A"])

    def forward(self, x: Float[Tensor, "*batch n"], layer: Layer) -> Float[Tensor, "*batch m"]:
        return ((x @ layer["A"].mT) @ layer["R"].mT) @ layer["B"].mT
