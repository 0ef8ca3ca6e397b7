"""FedDPA: a shared and a personal adapter side by side.

Yang et al. Dual-Personalizing Adapter for Federated Foundation Models. NeurIPS 2024. https://arxiv.org/abs/2403.19211

Use it when every client needs what all have learnt and something of its own, side by side.
Not when one model for all is wanted, or a client cannot afford a second pair in memory.
"""

from dataclasses import dataclass, field

from fedlora.adapters import DualLoRA
from fedlora.methods._base import Method, pick
from fedlora.types import Layer, Turn, Work


@dataclass(frozen=True)
class FedDPA(Method):
    """``A = Σ w_k A_k``, ``B = Σ w_k B_k`` for all; a second pair and the classifier stay with client k.

    Both pairs are trained together and both act in evaluation; the paper's choice of their shares for each input is
    not part of it. There is no global model: every client is measured with both pairs.
    """

    adapter: DualLoRA = field(default_factory=DualLoRA)

    title = "FedDPA"
    cite = """@inproceedings{yang2024feddpa, title = {Dual-Personalizing Adapter for Federated Foundation Models},
      author = {Yang and others}, booktitle = {NeurIPS}, year = {2024}, eprint = {2403.19211},
      archiveprefix = {arXiv}}"""
    adapters = (DualLoRA,)
    personal = True
    shares_head = False

    def send(self, work: Work, turn: Turn) -> Layer:
        return pick(work.end, self.adapter.trainable - self.adapter.own)
