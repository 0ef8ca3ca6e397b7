"""The geometric median of the updates, as a weighting of the uploads.

Pillutla et al. Robust Aggregation for Federated Learning. IEEE TSP 2022. https://arxiv.org/abs/1912.13445
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.security.robust._base import Defence, Seen, Verdict

SMOOTH = 1e-6  # of the median norm: a distance below it counts as this
STEPS, SETTLED = 200, 1e-10  # Weiszfeld's at most, and the change of the weights that ends them


@dataclass(frozen=True)
class GeometricMedian(Defence):
    """``argmin_z Σ w_k ‖D_k − z‖ = Σ c_k D_k``: Weiszfeld's steps ``c_k ∝ w_k / ‖D_k − z‖``, in coefficients only.

    No weight of an upload grows with its norm, and below half of the weight no one moves ``z`` without bound.
    """

    cite = """@article{pillutla2022robust, title = {Robust Aggregation for Federated Learning},
      author = {Pillutla and others}, journal = {IEEE Transactions on Signal Processing}, year = {2022},
      eprint = {1912.13445}, archiveprefix = {arXiv}}"""

    weighs = True

    def judge(self, seen):
        """Every upload, weighed by how near it lies."""
        return Verdict(centre(seen) / seen.w)


def centre(seen: Seen) -> Tensor:
    """(K,) ``c``: the median's coefficients, which are positive and sum to one."""
    c = seen.w
    least = SMOOTH * float(seen.norms.median()) or 1.0
    for _ in range(STEPS):
        near = seen.w / seen.away(c).clamp_min(least)
        before, c = c, near / near.sum()
        if bool((c - before).abs().max() <= SETTLED):
            break
    return c


def uniform(seen: Seen) -> Tensor:
    """The same where every upload has one voice, whatever rows it claims."""
    return centre(seen._replace(w=torch.full_like(seen.w, 1 / len(seen.w))))
