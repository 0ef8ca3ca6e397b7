"""Multi-Krum: the mean of the uploads with the lowest Krum scores.

Blanchard et al. Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
https://arxiv.org/abs/1703.02757
"""

from dataclasses import dataclass

from fedlora.security.robust._base import RobustAggregator, UploadWeights
from fedlora.security.robust.krum import Krum, krum_scores, select


@dataclass(frozen=True)
class MultiKrum(RobustAggregator):
    """The ``K − f`` uploads with the lowest scores, with their own weights."""

    cite = Krum.cite

    def judge(self, updates):
        f = self.max_attackers(len(updates.w))
        return UploadWeights(select(krum_scores(updates, f), len(updates.w) - f))
