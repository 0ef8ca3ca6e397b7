"""Geometric median of the updates, as weights of the uploads.

Pillutla et al. Robust Aggregation for Federated Learning. IEEE TSP 2022. https://arxiv.org/abs/1912.13445
"""

from dataclasses import dataclass

from torch import Tensor

from fedlora.security.robust._base import RobustAggregator, UpdateGeometry, UploadWeights

SMOOTH = 1e-6  # of the median norm: a distance below it counts as this
STEPS, SETTLED = 200, 1e-10  # Weiszfeld's steps at most, and the change of the weights that ends them


@dataclass(frozen=True)
class GeometricMedian(RobustAggregator):
    """``argmin_z Σ w_k ‖D_k − z‖ = Σ c_k D_k``: Weiszfeld's steps ``c_k ∝ w_k / ‖D_k − z‖`` on the coefficients.

    The weight of an upload never grows with its norm, and clients with less than half of the weight move ``z`` only
    within a bound.
    """

    cite = """@article{pillutla2022robust, title = {Robust Aggregation for Federated Learning},
      author = {Pillutla and others}, journal = {IEEE Transactions on Signal Processing}, year = {2022},
      eprint = {1912.13445}, archiveprefix = {arXiv}}"""

    weighs = True

    def judge(self, updates):
        return UploadWeights(median_coefficients(updates) / updates.w)


def median_coefficients(updates: UpdateGeometry) -> Tensor:
    """Compute the median's coefficients ``c`` (K,), which are positive and sum to one."""
    c = updates.w
    least = SMOOTH * float(updates.norms.median()) or 1.0
    for _ in range(STEPS):
        near = updates.w / updates.distances_from(c).clamp_min(least)
        before, c = c, near / near.sum()
        if bool((c - before).abs().max() <= SETTLED):
            break
    return c
