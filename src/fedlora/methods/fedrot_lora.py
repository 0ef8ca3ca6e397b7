"""FedRot-LoRA: turn each client's factors towards the shared ones before they are averaged.

Zhang et al. FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA. ICML 2026.
https://arxiv.org/abs/2602.23638

Use it when the clients' factors are suspected of turning against each other: the rotation is done by the client, so
the server still only averages, and secure aggregation works.
Not when the aggregation error itself must fall: measure first with ``fedlora compare --oracle`` how much it would
take.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.linalg.factors import polar, procrustes
from fedlora.methods._base import Method
from fedlora.types import Layer, Turn, Work

NEGLIGIBLE = 1e-6  # a singular value below this share of the largest: its direction has no sign to align


@dataclass(frozen=True)
class FedRotLoRA(Method):
    """Send ``Rᵀ A_k`` and ``B_k R``: the product stays, the factors no longer cancel in FedIT's means.

    ``R* = argmax_{R ∈ SO(r)} tr(Rᵀ M)`` with ``M = A_k A_refᵀ`` (odd rounds) or ``B_kᵀ B_ref`` (even rounds), where the
    reference is what the client has just received; ``R = polar((1 − λ) I + λ R*)`` turns only part of the way.
    In round 0 there is nothing to align with. ``strength`` is the paper's λ: 0 is FedIT, 1 the full rotation.
    """

    strength: float = 0.5
    align: Literal["alternate", "A", "B"] = "alternate"

    title = "FedRot-LoRA"
    cite = """@inproceedings{zhang2026fedrot,
      title = {{FedRot-LoRA}: Mitigating Rotational Misalignment in Federated {LoRA}},
      author = {Zhang and others}, booktitle = {ICML}, year = {2026}, eprint = {2602.23638},
      archiveprefix = {arXiv}}"""
    adapters = (LoRA,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"method.strength is {self.strength}; FedRot-LoRA's λ lies between 0 and 1.")

    def send(self, work: Work, turn: Turn) -> Layer:
        if turn.round == 0:
            return super().send(work, turn)
        R = self.rotation(work.start, work.end, turn.round).to(work.end["A"].dtype)
        return {"A": R.mT @ work.end["A"], "B": work.end["B"] @ R}

    def rotation(self, reference: Layer, end: Layer, round: int) -> Tensor:
        """``R (r r)`` in float64; the identity wherever the alignment is not determined."""
        side = {"alternate": "A" if round % 2 else "B"}.get(self.align, self.align)
        ref, factor = reference[side], end[side]
        M = (factor @ ref.mT if side == "A" else factor.mT @ ref).double()
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        nearest, S = procrustes(M)
        R, mixed = polar((1 - self.strength) * eye + self.strength * nearest)
        # The mixture is judged on the scale of a rotation: halfway between I and a half turn it is zero.
        sound = (S[..., -1] > NEGLIGIBLE * S[..., 0]) & (mixed[..., -1] > NEGLIGIBLE)
        return torch.where(sound[..., None, None], R, eye)
