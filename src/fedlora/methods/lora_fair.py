"""LoRA-FAIR: average ``A`` and ``B``, then correct ``B`` towards the mean of the products.

Bian et al. LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement. ICCV 2025.
https://arxiv.org/abs/2411.14961

Use it when FedIT's traffic must stay, ``A`` may stay the clients' mean, and the server may solve a small system a
weight.
Not when rounds must be exact, the server may not see single uploads, or ranks differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.adapters import LoRA
from fedlora.linalg.sums import Term, apply
from fedlora.methods._base import Method, mean
from fedlora.types import Layer, Outcome, Upload

CUT = 1e-12  # relative: below it a direction of Ā Āᵀ is rounding error, and B stays there


@dataclass(frozen=True)
class LoRAFAIR(Method):
    """``B = B̄ + argmin_D ‖Σ w_k B_k A_k − (B̄ + D) Ā‖² + μ ‖D‖² = B̄ + E Āᵀ (Ā Āᵀ + μ I)⁻¹``, ``A = Ā``.

    ``E = Σ w_k (B_k − B̄)(A_k − Ā)`` is what FedIT misses; the paper finds the correction by gradient descent on a
    cosine similarity, here it is the least-squares one, an ``r × r`` solve. ``mu`` keeps ``B`` near the mean.
    """

    mu: float = 0.01

    title = "LoRA-FAIR"
    cite = """@inproceedings{bian2025lorafair,
      title = {{LoRA-FAIR}: Federated {LoRA} Fine-Tuning with Aggregation and Initialization Refinement},
      author = {Bian and others}, booktitle = {ICCV}, year = {2025}, eprint = {2411.14961},
      archiveprefix = {arXiv}}"""
    adapters = (LoRA,)
    sums = False

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"method.mu is {self.mu}; LoRA-FAIR's regularisation cannot be negative.")

    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        averaged = mean(uploads)
        A, B = averaged["A"], averaged["B"]
        missed = apply((Term(u.weight, u.layer["B"] - B, u.layer["A"] - A) for u in uploads), A.mT)  # E Āᵀ
        G = (A.double() @ A.double().mT) + self.mu * torch.eye(A.shape[-2], dtype=torch.float64, device=A.device)
        correction = missed.double() @ torch.linalg.pinv(G, rtol=CUT, hermitian=True)
        return Outcome({**shared, "A": A, "B": B + correction.to(B.dtype)})
