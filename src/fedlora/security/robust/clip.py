"""Norm clipping: limits the norm of each update.

Sun et al. Can You Really Backdoor Federated Learning? 2019. https://arxiv.org/abs/1911.07963
"""

from dataclasses import dataclass

import torch

from fedlora.security.robust._base import RobustAggregator, UploadWeights


@dataclass(frozen=True)
class Clip(RobustAggregator):
    """``λ_k D_k`` with ``λ_k = min(1, limit · median ‖D‖ / ‖D_k‖)``, or with an absolute ``norm`` for the limit.

    The update is scaled, not the factors: the rest of the upload's weight goes to the leaves that were served.
    """

    cite = """@misc{sun2019backdoor, title = {Can You Really Backdoor Federated Learning?}, author = {Sun and others},
      year = {2019}, eprint = {1911.07963}, archiveprefix = {arXiv}}"""

    limit: float = 1.0  # in medians of the round's norms
    norm: float | None = None  # the limit itself, if it is known

    weighs = True

    def __post_init__(self):
        super().__post_init__()
        for key in ("limit", "norm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"robust.{key} is {value}; a limit of norms is a positive number.")

    def judge(self, updates):
        norms = updates.norms
        limit = self.norm if self.norm is not None else self.limit * float(norms.median())
        shrinkage = torch.where(norms > limit, limit / norms.clamp_min(1e-300), 1.0)
        return UploadWeights(torch.ones_like(norms), shrinkage)
