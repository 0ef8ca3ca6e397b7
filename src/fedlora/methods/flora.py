"""FLoRA: stack the clients' factors, fold the stack into the base, start afresh.

Wang et al. FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations. NeurIPS 2024.
https://arxiv.org/abs/2409.05976

Use it when clients have different ranks, rounds must be exact, and few clients take part in each.
Not when cohorts are large (what goes down is the whole stack), the base weights must stay as they are, or training
should go on from warm factors and optimiser moments: every round starts afresh.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.adapters import LoRA
from fedlora.linalg.sums import stack
from fedlora.methods._base import Method, terms
from fedlora.types import Layer, Outcome, Turn, Upload


@dataclass(frozen=True)
class FLoRA(Method):
    """``W += [w_1 s_1 B_1 … w_K s_K B_K] [A_1; …; A_K] = Σ w_k s_k B_k A_k``, whatever the ranks.

    The weight stands on one side only, and each client's own scale goes with it. Every turn starts from a fresh draw
    (``B = 0``), and what goes down is the stack: its rank is the sum of the cohort's.
    """

    title = "FLoRA"
    cite = """@inproceedings{wang2024flora,
      title = {{FLoRA}: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations},
      author = {Wang and others}, booktitle = {NeurIPS}, year = {2024}, eprint = {2409.05976},
      archiveprefix = {arXiv}}"""
    adapters = (LoRA,)
    exact = True
    any_rank = True
    sums = False
    keeps_frame = False

    def receive(self, shared: Layer, kept: Layer, turn: Turn) -> Layer:
        m, n = shared["B"].shape[-2], shared["A"].shape[-1]
        fresh = {leaf: x.to(shared[leaf]) for leaf, x in self.adapter.init(m, n, turn.seed).items()}
        return self.adapter.leading(fresh, turn.rank)

    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        return Outcome(shared, base_update=(stack(terms(self.adapter, uploads)),))
