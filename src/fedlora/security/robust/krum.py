"""Krum: the one upload that has the nearest neighbours.

Blanchard et al. Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
https://arxiv.org/abs/1703.02757
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.security.robust._base import Defence, Seen, Verdict


@dataclass(frozen=True)
class Krum(Defence):
    """``argmin_k Σ_{l near k} ‖D_k − D_l‖²`` over the ``K − f − 2`` nearest others, ``f`` the hostile ones."""

    cite = """@inproceedings{blanchard2017krum,
      title = {Machine Learning with Adversaries: {Byzantine} Tolerant Gradient Descent},
      author = {Blanchard and others}, booktitle = {NeurIPS}, year = {2017}, eprint = {1703.02757},
      archiveprefix = {arXiv}}"""

    def judge(self, seen):
        """The best upload alone."""
        return Verdict(chosen(scores(seen, self.hostile(len(seen.w))), 1))


def scores(seen: Seen, f: int) -> Tensor:
    """(K,) Krum's score of every upload: less is better."""
    K = len(seen.w)
    others = seen.squares + torch.diag(torch.full((K,), torch.inf, dtype=torch.float64))
    found: Tensor = others.sort(dim=1).values[:, : max(1, K - f - 2)].sum(1)
    return found


def chosen(scores: Tensor, many: int) -> Tensor:
    """1 for the so many uploads of the least score, 0 for the others; of equals, the first clients."""
    found = torch.zeros_like(scores)
    return found.index_fill(0, scores.argsort(stable=True)[:many], 1.0)
