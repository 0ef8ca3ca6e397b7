"""Median of means: the group of clients with the mean nearest to the other groups' means.

Minsker. Geometric Median and Robust Estimation in Banach Spaces. Bernoulli 2015. https://arxiv.org/abs/1308.1334
Chen, Su and Xu. Distributed Statistical Machine Learning in Adversarial Settings. 2017.
https://arxiv.org/abs/1705.05491
"""

from dataclasses import dataclass

import torch

from fedlora.linalg.geometry import squared_distances
from fedlora.security.robust._base import RobustAggregator, UploadWeights


@dataclass(frozen=True)
class MedianOfMeans(RobustAggregator):
    """``2 f + 1`` groups, drawn anew each round; selects the one with the least median distance from the other means.

    Most groups have no hostile member, so its mean lies among means of honest clients. Only its uploads count, with
    their own weights.
    """

    cite = """@article{minsker2015median, title = {Geometric Median and Robust Estimation in {Banach} Spaces},
      author = {Minsker}, journal = {Bernoulli}, year = {2015}, eprint = {1308.1334}, archiveprefix = {arXiv}}
    @misc{chen2017adversarial, title = {Distributed Statistical Machine Learning in Adversarial Settings},
      author = {Chen and Su and Xu}, year = {2017}, eprint = {1705.05491}, archiveprefix = {arXiv}}"""

    def judge(self, updates):
        K = len(updates.w)
        groups = min(K, 2 * int(self.attackers * K) + 1)
        order = torch.randperm(K, generator=torch.Generator().manual_seed(updates.seed))
        member = torch.zeros(groups, K, dtype=torch.float64)
        member = member.index_put((torch.arange(K) % groups, order), updates.w[order])
        means = member / member.sum(1, keepdim=True)  # one row a group: the coefficients of its mean
        distance = squared_distances(means @ updates.G @ means.mT).sqrt()
        best = int(distance.median(dim=1).values.argmin())
        return UploadWeights((member[best] > 0).to(torch.float64))
