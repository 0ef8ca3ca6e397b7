"""Random cohorts of trained LoRA factors, and the dense oracle that knows nothing of the library's algebra."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.methods._base import Method
from fedlora.rounds import Received, Served, server_turn
from fedlora.types import Layer, Turn


@dataclass(frozen=True)
class Cohort:
    """``K`` clients around a common start, with unequal example counts."""

    A: list[Tensor]
    B: list[Tensor]
    examples: list[int]
    start: Layer

    @classmethod
    def drawn(
        cls,
        seed: int,
        K: int = 4,
        r: int = 3,
        m: int = 11,
        n: int = 8,
        spread: float = 1.0,
        ranks: list[int] | None = None,
    ) -> "Cohort":
        """``ranks`` gives each client its own; ``r`` is then the largest that the server holds."""
        g = torch.Generator().manual_seed(seed)
        A0, B0 = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, n), (m, r)))
        A = [A0 + spread * torch.randn(r, n, generator=g, dtype=torch.float64) for _ in range(K)]
        B = [B0 + spread * torch.randn(m, r, generator=g, dtype=torch.float64) for _ in range(K)]
        A, B = ([x[:own] for x, own in zip(A, ranks or [r] * K)], [x[:, :own] for x, own in zip(B, ranks or [r] * K)])
        examples = torch.randint(1, 50, (K,), generator=g).tolist()
        return cls(A, B, examples, {"A": A0, "B": B0})

    @property
    def w(self) -> list[float]:
        return [n / sum(self.examples) for n in self.examples]

    @property
    def exact(self) -> Tensor:
        """``Σ w_k B_k A_k``, densely, without any scale."""
        return sum(w * B @ A for w, B, A in zip(self.w, self.B, self.A))

    def update(self, alpha: float, rslora: bool = False) -> Tensor:
        """``W* = Σ w_k s_k B_k A_k``, densely, each client's own scale inside."""
        return sum(w * s * B @ A for w, s, B, A in zip(self.w, self.scales(alpha, rslora), self.B, self.A))

    def scales(self, alpha: float, rslora: bool = False) -> list[float]:
        return [alpha / (len(A) ** 0.5 if rslora else len(A)) for A in self.A]

    def outcome(self, method: Method) -> Served:
        uploads = [
            Received(Turn(1, k, len(A)), n, {"weight": {"A": A, "B": B}})
            for k, (n, A, B) in enumerate(zip(self.examples, self.A, self.B))
        ]
        return server_turn({"weight": method}, {"weight": self.start}, uploads)

    def served(self, method: Method) -> Layer:
        return self.outcome(method).shared["weight"]

    def ends_at(self, method: Method) -> Tensor:
        """What the round adds to the base as a whole: served product and folds."""
        found = self.outcome(method)
        folds = sum((f.dense() for f in found.folds.get("weight", ())), torch.zeros_like(self.exact))
        return method.adapter.delta(found.shared["weight"]).dense() + folds

    def error(self, method: Method) -> float:
        layer = self.served(method)
        return float((layer["B"] @ layer["A"] - self.exact).norm())

    @property
    def best(self) -> float:
        """The least error of any matrix of this rank (Eckart and Young)."""
        return float(torch.linalg.svdvals(self.exact)[self.A[0].shape[0] :].norm())


def lora(cohort: Cohort) -> LoRA:
    return LoRA(cohort.A[0].shape[0], 5.0)
