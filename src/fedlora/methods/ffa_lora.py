"""FFA-LoRA: freeze ``A`` at a common start, train and average ``B``.

Sun et al. Improving LoRA in Privacy-preserving Federated Learning. ICLR 2024. https://arxiv.org/abs/2403.12313

Use it when exact rounds at half of FedIT's bytes are worth more than a trained ``A``: under noise for privacy, with
high learning rates, or behind secure aggregation.
Not when the rank is so small that the directions drawn for ``A`` cannot hold the task: nobody ever trains them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora.methods._base import Method
from fedlora.types import Layer, Turn


@dataclass(frozen=True)
class FFALoRA(Method):
    """``B = Σ w_k B_k`` with ``A`` as drawn from the seed, so ``B A = Σ w_k B_k A`` exactly, at half the bytes."""

    title = "FFA-LoRA"
    cite = """@inproceedings{sun2024ffa, title = {Improving {LoRA} in Privacy-preserving Federated Learning},
      author = {Sun and others}, booktitle = {ICLR}, year = {2024}, eprint = {2403.12313},
      archiveprefix = {arXiv}}"""
    exact = True

    def trains(self, start: Layer, turn: Turn, gradient: Callable[[], Layer]) -> frozenset[str]:
        return self.adapter.outputs
