"""RoLoRA: train ``B`` in even rounds and ``A`` in odd ones.

Chen et al. Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA. NeurIPS 2025.
https://arxiv.org/abs/2502.01755

Use it when rounds must be exact and uploads small, but ``A`` has to be learnt too.
Not when rounds are few or clients are often away: each factor moves in every second round only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora.methods._base import Method
from fedlora.types import Layer, Turn


@dataclass(frozen=True)
class RoLoRA(Method):
    """Even rounds ``B = Σ w_k B_k``, odd rounds ``A = Σ w_k A_k``; the other is common, so each mean is exact.

    The turn goes by the round, not by the client: clients of one round must hold the same other factor.
    """

    title = "RoLoRA"
    cite = """@inproceedings{chen2025rolora,
      title = {Robust Federated Finetuning of {LLMs} via Alternating Optimization of {LoRA}},
      author = {Chen and others}, booktitle = {NeurIPS}, year = {2025}, eprint = {2502.01755},
      archiveprefix = {arXiv}}"""
    exact = True

    def trains(self, start: Layer, turn: Turn, gradient: Callable[[], Layer]) -> frozenset[str]:
        return self.adapter.outputs if turn.round % 2 == 0 else self.adapter.inputs
