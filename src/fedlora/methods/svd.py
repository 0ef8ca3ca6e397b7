"""svd: serve the best factors of the exact mean, in the frame where the clients' optimisers left theirs.

No paper: Eckart and Young's theorem (1936) gives the product, and a gauge chosen near FedIT's means the factors.

Use it when one adapter of a given rank is to come out of several, in a federation or of finished PEFT folders: no
other adapter of that rank is nearer to the exact mean.
Not when the server may not see single uploads, or must spend nothing but additions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedlora.adapters import LoRA
from fedlora.linalg.balancing import Pair, anchor, balance, refine, rotate
from fedlora.linalg.sums import Lazy, Term, stack, truncated_svd
from fedlora.methods._base import Method, mean, terms
from fedlora.types import Layer, Outcome, Turn, Upload


@dataclass(frozen=True)
class BestRank(Method):
    """``argmin ‖Σ w_k s_k B_k A_k − s B A‖_F`` at rank r, served as ``T A`` and ``B T⁻¹`` with ``T`` by ``gauge``.

    ``balanced``: ``T = I``, ``√S`` on both sides. ``rotation``: the orthogonal ``T`` that brings both factors nearest
    to FedIT's means. ``anchor``: the invertible ``T`` that does, each factor relative to its own size. ``sweeps`` > 0
    takes the cheap relative instead: alternating least squares on the factors, from FedIT's means; it never leaves
    their frame. ``fold_rest`` folds what the rank cuts off into the base, which makes a round exact.
    """

    adapter: LoRA = field(default_factory=LoRA)
    gauge: Literal["anchor", "rotation", "balanced"] = "anchor"
    sweeps: int = 0
    fold_rest: bool = False

    title = "SVD"
    adapters = (LoRA,)
    any_rank = True
    sums = False

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise ValueError(f"method.sweeps is {self.sweeps}; it is 0 for the exact SVD, or a number of sweeps.")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.fold_rest

    @property
    def keeps_frame(self) -> bool:  # type: ignore[override]
        return self.sweeps > 0 or self.gauge != "balanced"

    def receive(self, shared: Layer, kept: Layer, turn: Turn) -> Layer:
        return self.adapter.leading({**shared, **kept}, turn.rank)

    def combine(self, shared: Layer, uploads: Sequence[Upload]) -> Outcome:
        rank = shared["A"].shape[-2]
        s = self.adapter.scale(rank)
        exact = terms(self.adapter, uploads)
        goal = Lazy(len(exact), lambda k: exact[k]._replace(c=exact[k].c / s))  # B A, without the scale
        alike = len({u.turn.rank for u in uploads}) == 1
        padded = uploads if alike else [u._replace(layer=self.adapter.pad(u.layer, rank)) for u in uploads]
        means = self.adapter.pad(mean(padded), rank)
        A, B = self._factors(goal, means, rank)
        layer = {**shared, "A": A, "B": B}
        if not self.fold_rest:
            return Outcome(layer)
        return Outcome(layer, base_update=(stack([*exact, Term(-s, B, A)]),))

    def _factors(self, goal: Sequence[Term], means: Layer, rank: int) -> Pair:
        A, B = means["A"], means["B"]
        if self.sweeps:
            return refine(goal, A, B, self.sweeps)
        svd = truncated_svd(goal, rank, A.mT)
        if self.gauge == "anchor":
            return anchor(svd, A, B)
        return rotate(*balance(svd, rank), A, B) if self.gauge == "rotation" else balance(svd, rank)
