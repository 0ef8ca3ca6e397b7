"""Random cohorts of trained LoRA factors, and the dense oracle that knows nothing of the library's algebra."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.method import Method
from fedlora.rounds import Received, server_turn
from fedlora.types import Layer, Turn


@dataclass(frozen=True)
class Cohort:
    """``K`` clients around a common start, with unequal example counts."""

    A: list[Tensor]
    B: list[Tensor]
    examples: list[int]
    start: Layer

    @classmethod
    def drawn(cls, seed: int, K: int = 4, r: int = 3, m: int = 11, n: int = 8, spread: float = 1.0) -> "Cohort":
        g = torch.Generator().manual_seed(seed)
        A0, B0 = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, n), (m, r)))
        A = [A0 + spread * torch.randn(r, n, generator=g, dtype=torch.float64) for _ in range(K)]
        B = [B0 + spread * torch.randn(m, r, generator=g, dtype=torch.float64) for _ in range(K)]
        examples = torch.randint(1, 50, (K,), generator=g).tolist()
        return cls(A, B, examples, {"A": A0, "B": B0})

    @property
    def w(self) -> list[float]:
        return [n / sum(self.examples) for n in self.examples]

    @property
    def exact(self) -> Tensor:
        """``Σ w_k B_k A_k``, densely."""
        return sum(w * B @ A for w, B, A in zip(self.w, self.B, self.A))

    def served(self, method: Method) -> Layer:
        uploads = [
            Received(Turn(1, k, method.adapter.budget), n, {"weight": {"A": A, "B": B}})
            for k, (n, A, B) in enumerate(zip(self.examples, self.A, self.B))
        ]
        return server_turn({"weight": method}, {"weight": self.start}, uploads).shared["weight"]

    def error(self, method: Method) -> float:
        layer = self.served(method)
        return float((layer["B"] @ layer["A"] - self.exact).norm())

    @property
    def best(self) -> float:
        """The least error of any matrix of this rank (Eckart and Young)."""
        return float(torch.linalg.svdvals(self.exact)[self.A[0].shape[0] :].norm())


def lora(cohort: Cohort) -> LoRA:
    return LoRA(cohort.A[0].shape[0], 5.0)
