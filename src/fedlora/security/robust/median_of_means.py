"""Median of means: the group of clients whose mean has the others' means nearest.

Minsker. Geometric Median and Robust Estimation in Banach Spaces. Bernoulli 2015. https://arxiv.org/abs/1308.1334
Chen, Su and Xu. Distributed Statistical Machine Learning in Adversarial Settings. 2017.
https://arxiv.org/abs/1705.05491
"""

from dataclasses import dataclass

import torch

from fedlora.security.robust._base import Defence, Verdict


@dataclass(frozen=True)
class MedianOfMeans(Defence):
    """``2 f + 1`` groups, drawn anew each round; the group whose mean has the least median distance to the others'.

    Most groups have no hostile member, so the chosen one lies among means of honest clients. Its uploads alone count,
    with the weights that they have.
    """

    cite = """@article{minsker2015median, title = {Geometric Median and Robust Estimation in {Banach} Spaces},
      author = {Minsker}, journal = {Bernoulli}, year = {2015}, eprint = {1308.1334}, archiveprefix = {arXiv}}
    @misc{chen2017adversarial, title = {Distributed Statistical Machine Learning in Adversarial Settings},
      author = {Chen and Su and Xu}, year = {2017}, eprint = {1705.05491}, archiveprefix = {arXiv}}"""

    def judge(self, seen):
        """The members of one group."""
        K = len(seen.w)
        groups = min(K, 2 * int(self.attackers * K) + 1)
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seen.seed))
        member = torch.zeros(groups, K, dtype=torch.float64)
        member = member.index_put((torch.arange(K) % groups, order), seen.w[order])
        means = member / member.sum(1, keepdim=True)  # a row a group: the coefficients of its mean
        between = means @ seen.G @ means.mT
        own = between.diagonal()
        away = (own[:, None] + own[None, :] - 2 * between).clamp_min(0).sqrt()
        best = int(away.median(dim=1).values.argmin())
        return Verdict((member[best] > 0).to(torch.float64))
