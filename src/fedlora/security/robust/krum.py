"""Krum: the one upload with the nearest neighbours.

Blanchard et al. Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
https://arxiv.org/abs/1703.02757
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.linalg.geometry import squared_distances
from fedlora.security.robust._base import RobustAggregator, UpdateGeometry, UploadWeights


@dataclass(frozen=True)
class Krum(RobustAggregator):
    """``argmin_k Σ_{l near k} ‖D_k − D_l‖²`` over the ``K − f − 2`` nearest others, with ``f`` hostile ones."""

    cite = """@inproceedings{blanchard2017krum,
      title = {Machine Learning with Adversaries: {Byzantine} Tolerant Gradient Descent},
      author = {Blanchard and others}, booktitle = {NeurIPS}, year = {2017}, eprint = {1703.02757},
      archiveprefix = {arXiv}}"""

    def judge(self, updates):
        return UploadWeights(select(krum_scores(updates, self.max_attackers(len(updates.w))), 1))


def krum_scores(updates: UpdateGeometry, f: int) -> Tensor:
    """Compute Krum's score of each upload (K,); lower is better."""
    K = len(updates.w)
    others = squared_distances(updates.G) + torch.diag(torch.full((K,), torch.inf, dtype=torch.float64))
    return others.sort(dim=1).values[:, : max(1, K - f - 2)].sum(1)


def select(scores: Tensor, count: int) -> Tensor:
    """Return 1 for the ``count`` lowest scores, and 0 for the others; of equal ones, the first clients count."""
    return torch.zeros_like(scores).index_fill(0, scores.argsort(stable=True)[:count], 1.0)
