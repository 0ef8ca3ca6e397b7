"""FedSA-LoRA: share ``A``, keep ``B``.

Guo et al. Selective Aggregation for Low-Rank Adaptation in Federated Learning. ICLR 2025.
https://arxiv.org/abs/2410.01463

Use it when clients disagree (about what labels mean, how to answer, what their rows look like) and each may have a
model of its own; it also sends least of all that send something of a LoRA.
Not when one model for all is wanted, new parties must be served at once, or clients cannot keep state between rounds.
"""

from dataclasses import dataclass

from fedlora.methods._base import Method, pick
from fedlora.types import Layer, Turn, Work


@dataclass(frozen=True)
class FedSALoRA(Method):
    """``A = Σ w_k A_k`` for all; ``B_k`` and the classifier stay with client k.

    Only the input side is sent. With rsLoRA the rule is the same, and with VeRA the shared side is the vector ``d``
    and the private one ``b``. There is no global model: every client is measured with what it holds.
    """

    title = "FedSA-LoRA"
    cite = """@inproceedings{guo2025fedsa,
      title = {Selective Aggregation for Low-Rank Adaptation in Federated Learning},
      author = {Guo and others}, booktitle = {ICLR}, year = {2025}, eprint = {2410.01463},
      archiveprefix = {arXiv}}"""
    personal = True
    shares_head = False

    def send(self, work: Work, turn: Turn) -> Layer:
        return pick(work.end, self.adapter.inputs)
