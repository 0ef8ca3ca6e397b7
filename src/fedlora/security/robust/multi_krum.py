"""Multi-Krum: the mean of the uploads with the best scores of Krum.

Blanchard et al. Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
https://arxiv.org/abs/1703.02757
"""

from dataclasses import dataclass

from fedlora.security.robust._base import Defence, Verdict
from fedlora.security.robust.krum import chosen, scores


@dataclass(frozen=True)
class MultiKrum(Defence):
    """The ``K − f`` uploads of the least score, with the weights that they have."""

    cite = """@inproceedings{blanchard2017krum,
      title = {Machine Learning with Adversaries: {Byzantine} Tolerant Gradient Descent},
      author = {Blanchard and others}, booktitle = {NeurIPS}, year = {2017}, eprint = {1703.02757},
      archiveprefix = {arXiv}}"""

    def judge(self, seen):
        """All but the ``f`` worst."""
        f = self.hostile(len(seen.w))
        return Verdict(chosen(scores(seen, f), len(seen.w) - f))
