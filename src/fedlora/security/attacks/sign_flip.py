"""Sign flip: the update the other way round.

Li et al. RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous Datasets.
AAAI 2019. https://arxiv.org/abs/1811.03761
"""

from dataclasses import dataclass

from fedlora.security.attacks._base import Attack, moved


@dataclass(frozen=True)
class SignFlip(Attack):
    """``−scale`` times the change of every leaf. (``−B`` and ``−A`` together would be the same product.)"""

    cite = """@inproceedings{li2019rsa,
      title = {{RSA}: {Byzantine}-Robust Stochastic Aggregation Methods for Distributed
        Learning from Heterogeneous Datasets},
      author = {Li and others}, booktitle = {AAAI}, year = {2019}, eprint = {1811.03761},
      archiveprefix = {arXiv}}"""

    scale: float = 3.0

    def sends(self, rules, start, sent, turn):
        """The reversed update."""
        return {part: moved(start[part], layer, -self.scale) for part, layer in sent.items()}
