"""Inner product manipulation: the reversed honest mean, small enough not to be an outlier.

Xie et al. Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation. UAI 2019.
https://arxiv.org/abs/1903.03936
"""

from dataclasses import dataclass

from fedlora.security.attacks._base import Attack
from fedlora.security.attacks.collude import forge


@dataclass(frozen=True)
class InnerProduct(Attack):
    """``−scale`` times the mean of the honest updates, leaf by leaf. The attackers know all uploads of the round."""

    cite = """@inproceedings{xie2019fall,
      title = {Fall of Empires: Breaking {Byzantine}-tolerant {SGD} by Inner Product Manipulation},
      author = {Xie and others}, booktitle = {UAI}, year = {2019}, eprint = {1903.03936},
      archiveprefix = {arXiv}}"""

    scale: float = 1.5

    meets = "'inner-product', whose attackers know the others' uploads"

    def alter_together(self, rules, shared, uploads, overheard):
        honest = [upload for client, upload in uploads.items() if client not in self.attackers]
        return forge(self, rules, shared, uploads, honest, -self.scale)
