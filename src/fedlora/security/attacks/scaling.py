"""Scaling: an update scaled so much that it replaces the mean.

Bagdasaryan et al. How To Backdoor Federated Learning. AISTATS 2020. https://arxiv.org/abs/1807.00459
"""

from dataclasses import dataclass

from fedlora.security.attacks._base import Attack, scale_change


@dataclass(frozen=True)
class Scaling(Attack):
    """Scales the change of every leaf by ``scale``."""

    cite = """@inproceedings{bagdasaryan2020backdoor, title = {How To Backdoor Federated Learning},
      author = {Bagdasaryan and others}, booktitle = {AISTATS}, year = {2020}, eprint = {1807.00459},
      archiveprefix = {arXiv}}"""

    scale: float = 20.0

    def alter(self, rules, start, sent, turn):
        return {part: scale_change(start[part], layer, self.scale) for part, layer in sent.items()}
