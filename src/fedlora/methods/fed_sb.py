"""Fed-SB: train and average only the small core between frozen factors.

Singhal et al. Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning. 2025. https://arxiv.org/abs/2502.15436

Use it when uploads must be small and exact at a high rank: only a square core travels.
Not when the result must stay a LoRA of small rank, or the frozen outer factors, drawn from the seed, cannot hold the
task.
"""

from dataclasses import dataclass, field

from fedlora.adapters import Adapter, LoRASB
from fedlora.methods._base import Method


@dataclass(frozen=True)
class FedSB(Method):
    """``R = Σ w_k R_k`` in ``ΔW = B R A``: linear in what is trained, so exact, and ``r²`` numbers a weight.

    The whole method is the parametrisation; what is sent and averaged is what FedIT would send of it.
    """

    adapter: Adapter = field(default_factory=LoRASB)

    title = "Fed-SB"
    cite = """@misc{singhal2025fedsb,
      title = {{Fed-SB}: A Silver Bullet for Extreme Communication Efficiency and Performance in
        (Private) Federated {LoRA} Fine-Tuning},
      author = {Singhal and others}, year = {2025}, eprint = {2502.15436}, archiveprefix = {arXiv}}"""
    adapters = (LoRASB,)
    exact = True
