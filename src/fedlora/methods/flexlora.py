"""FlexLoRA: average the products, and serve each client the best approximation of the mean at its own rank.

Bai et al. Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources.
NeurIPS 2024. https://arxiv.org/abs/2402.11505

Use it when clients have different ranks and each should get the best approximation of the mean that its rank allows.
Not when the clients' optimisers keep their moments: balanced factors jump from round to round (``svd`` serves the
same product in a frame that stays); or the server may not see single uploads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedlora.adapters import LoRA
from fedlora.linalg.sums import truncated_svd
from fedlora.methods._base import Method, mean, terms
from fedlora.types import Layer, Outcome, Turn, Upload


@dataclass(frozen=True)
class FlexLoRA(Method):
    """``W* = Σ w_k s_k B_k A_k = P S Qᵀ``; client k receives ``s_k B = P_r √S_r`` and ``A = √S_r Q_rᵀ`` at ``r = r_k``.

    The singular triples come in falling order, so a client's share is the leading part of what the server holds.
    """

    adapter: LoRA = field(default_factory=LoRA)

    title = "FlexLoRA"
    cite = """@inproceedings{bai2024flexlora,
      title = {Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources},
      author = {Bai and others}, booktitle = {NeurIPS}, year = {2024}, eprint = {2402.11505},
      archiveprefix = {arXiv}}"""
    adapters = (LoRA,)
    any_rank = True
    sums = False
    keeps_frame = False

    def receive(self, shared: Layer, kept: Layer, turn: Turn) -> Layer:
        return self.adapter.leading({**shared, **kept}, turn.rank)

    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        rank = shared["A"].shape[-2]
        alike = len({u.turn.rank for u in uploads}) == 1
        start = mean(uploads)["A"].mT if alike else None
        product = truncated_svd(terms(self.adapter, uploads), rank, start).factors()
        return Outcome({**shared, **self.adapter.pad(self.adapter.split(product), rank)})
