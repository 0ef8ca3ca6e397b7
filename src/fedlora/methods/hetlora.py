"""HetLoRA: clients of different ranks, padded with zeros and weighted by the size of their updates.

Cho et al. Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models. EMNLP 2024.
https://arxiv.org/abs/2401.06432

Use it when devices are very unequal and clients may prune their own ranks while they train.
Not when rounds must be exact, or clients may be hostile: who sends a larger update counts for more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import LoRA
from fedlora.linalg.geometry import norms
from fedlora.methods._base import Method
from fedlora.types import Layer, Outcome, Turn, Upload, Work

RANK = "_rank"  # what a client has pruned itself down to


@dataclass(frozen=True)
class HetLoRA(Method):
    """``A = Σ p_k pad(A_k)``, ``B = Σ p_k pad(B_k)``, ``p_k ∝ w_k ‖ΔW_k‖_F``; a client starts from the leading ranks.

    The paper knows no weight by examples, so ``w`` is uniform unless ``weighting`` says otherwise.
    ``decay`` γ < 1 lets a client prune itself: ``tail_penalty · ‖A_tail‖ ‖B_tail‖`` is added to its loss, where the
    tail is what lies beyond ``γ r``, and if the tail has shrunk in training, the client goes on with ``γ r`` ranks.
    """

    adapter: LoRA = field(default_factory=LoRA)
    weighting: Literal["examples", "uniform"] = "uniform"
    decay: float = 1.0
    tail_penalty: float = 0.0

    title = "HetLoRA"
    cite = """@inproceedings{cho2024hetlora,
      title = {Heterogeneous {LoRA} for Federated Fine-tuning of On-Device Foundation Models},
      author = {Cho and others}, booktitle = {EMNLP}, year = {2024}, eprint = {2401.06432},
      archiveprefix = {arXiv}}"""
    adapters = (LoRA,)
    any_rank = True
    sums = False
    weighs = True

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"method.decay is {self.decay}; HetLoRA's γ lies above 0 and at most at 1.")
        if self.tail_penalty < 0:
            raise ValueError(f"method.tail_penalty is {self.tail_penalty}; it cannot be negative.")

    @property
    def prunes(self) -> bool:
        return self.decay < 1

    def receive(self, shared: Layer, kept: Layer, turn: Turn) -> Layer:
        return self.adapter.leading(shared, int(kept.get(RANK, turn.rank)))

    def penalty(self, layer: Layer) -> Tensor | float:
        return self.tail_penalty * self._tail(layer) if self.decay < 1 and self.tail_penalty else 0.0

    def send(self, work: Work, turn: Turn) -> Layer:
        sent = super().send(work, turn)
        shrank = self.decay < 1 and bool(self._tail(work.end) < self._tail(work.start))
        return self.adapter.leading(sent, self._shorter(sent)) if shrank else sent

    def keep(self, work: Work, sent: Layer, turn: Turn) -> Layer:
        return {RANK: torch.tensor(sent["A"].shape[-2])} if self.decay < 1 else {}

    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        rank = shared["A"].shape[-2]
        sizes = norms([self.adapter.term(u.layer, u.weight) for u in uploads])  # k *stack
        w = sizes.new_tensor([u.weight for u in uploads]).reshape(-1, *[1] * (sizes.ndim - 1))
        total = sizes.sum(0)
        p = torch.where(total > 0, sizes / total.clamp_min(torch.finfo(sizes.dtype).tiny), w)
        mean = {leaf: torch.zeros_like(shared[leaf]) for leaf in "AB"}
        for q, upload in zip(p, uploads):
            layer = self.adapter.pad(upload.layer, rank)
            mean = {leaf: torch.addcmul(x, layer[leaf], q.to(x.dtype)[..., None, None]) for leaf, x in mean.items()}
        return Outcome({**shared, **mean})

    def _shorter(self, layer: Layer) -> int:
        return max(1, int(self.decay * layer["A"].shape[-2]))

    def _tail(self, layer: Layer) -> Tensor:
        r = self._shorter(layer)
        return torch.mul(layer["A"][..., r:, :].norm(), layer["B"][..., r:].norm())
