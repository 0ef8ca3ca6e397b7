"""Scaling: an update many times its size, so that it replaces the mean.

Bagdasaryan et al. How To Backdoor Federated Learning. AISTATS 2020. https://arxiv.org/abs/1807.00459
"""

from dataclasses import dataclass

from fedlora.security.attacks._base import Attack, moved


@dataclass(frozen=True)
class Scaling(Attack):
    """``scale`` times the change of every leaf."""

    cite = """@inproceedings{bagdasaryan2020backdoor, title = {How To Backdoor Federated Learning},
      author = {Bagdasaryan and others}, booktitle = {AISTATS}, year = {2020}, eprint = {1807.00459},
      archiveprefix = {arXiv}}"""

    scale: float = 20.0

    def sends(self, rules, start, sent, turn):
        """The enlarged update."""
        return {part: moved(start[part], layer, self.scale) for part, layer in sent.items()}
