"""Trimmed mean by distance: leaves out the uploads farthest from the geometric median.

Yin et al. Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. ICML 2018 trim each coordinate,
which a pair of factors does not have: https://arxiv.org/abs/1803.01498. Whole updates are trimmed here.
"""

from dataclasses import dataclass

import torch

from fedlora.security.robust._base import RobustAggregator, UploadWeights
from fedlora.security.robust.geometric_median import median_coefficients
from fedlora.security.robust.krum import select


@dataclass(frozen=True)
class Trimmed(RobustAggregator):
    """All but the ``⌊attackers · K⌋`` uploads with the largest ``‖D_k − z‖``, with their own weights."""

    cite = """@inproceedings{yin2018byzantine,
      title = {{Byzantine}-Robust Distributed Learning: Towards Optimal Statistical Rates},
      author = {Yin and others}, booktitle = {ICML}, year = {2018}, eprint = {1803.01498},
      archiveprefix = {arXiv}}"""

    def judge(self, updates):
        K = len(updates.w)
        equal = updates._replace(w=torch.full_like(updates.w, 1 / K))  # independent of the rows that clients claim
        return UploadWeights(select(updates.distances_from(median_coefficients(equal)), K - int(self.attackers * K)))
