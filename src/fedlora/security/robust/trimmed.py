"""Trimmed mean by distance: without the uploads farthest from the geometric median.

Yin et al. Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. ICML 2018 trim each coordinate,
of which a pair of factors has none: https://arxiv.org/abs/1803.01498. Whole updates are trimmed here.
"""

from dataclasses import dataclass

from fedlora.security.robust._base import Defence, Verdict
from fedlora.security.robust.geometric_median import uniform
from fedlora.security.robust.krum import chosen


@dataclass(frozen=True)
class Trimmed(Defence):
    """All but the ``⌊attackers · K⌋`` uploads with the largest ``‖D_k − z‖``, with the weights that they have."""

    cite = """@inproceedings{yin2018byzantine,
      title = {{Byzantine}-Robust Distributed Learning: Towards Optimal Statistical Rates},
      author = {Yin and others}, booktitle = {ICML}, year = {2018}, eprint = {1803.01498},
      archiveprefix = {arXiv}}"""

    def judge(self, seen):
        """Distances from the median of the updates, one voice a client."""
        K = len(seen.w)
        return Verdict(chosen(seen.away(uniform(seen)), K - int(self.attackers * K)))
