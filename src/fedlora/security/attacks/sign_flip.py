"""Sign flip: the reversed update.

Li et al. RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous Datasets.
AAAI 2019. https://arxiv.org/abs/1811.03761
"""

from dataclasses import dataclass

from fedlora.security.attacks._base import Attack, scale_change


@dataclass(frozen=True)
class SignFlip(Attack):
    """Scales the change of every leaf by ``−scale``. (``−B`` and ``−A`` together would give the same product.)"""

    cite = """@inproceedings{li2019rsa,
      title = {{RSA}: {Byzantine}-Robust Stochastic Aggregation Methods for Distributed
        Learning from Heterogeneous Datasets},
      author = {Li and others}, booktitle = {AAAI}, year = {2019}, eprint = {1811.03761},
      archiveprefix = {arXiv}}"""

    scale: float = 3.0

    def alter(self, rules, start, sent, turn):
        return {part: scale_change(start[part], layer, -self.scale) for part, layer in sent.items()}
