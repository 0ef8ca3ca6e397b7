"""The interface of robust aggregators, which weigh uploads by the geometry of a round's updates.

An aggregator gets only the ``K × K`` matrix of inner products of the updates, so it is independent of the factors: a
client gains nothing by rescaling or rotating its pair. The method's own ``combine`` uses the result: uploads are left
out, weighted anew, or shrunk towards the leaves that were served.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, shares
from fedlora.security.validation.expected import build_upload_spec
from fedlora.security.validation.update_norms import gram_matrix
from fedlora.seeds import derive_seed
from fedlora.types import Tree


class UpdateGeometry(NamedTuple):
    """The geometry of a round of ``K`` updates, in the order of the clients."""

    G: Float[Tensor, "K K"]  # inner products of the updates, float64
    w: Float[Tensor, "K"]  # the clients' shares, which sum to one
    seed: int  # of the round

    @property
    def norms(self) -> Tensor:
        """``‖D_k‖``."""
        return self.G.diagonal().clamp_min(0).sqrt()

    def distances_from(self, c: Tensor) -> Tensor:
        """``‖D_k − Σ c_l D_l‖`` of every k."""
        return (self.G.diagonal() - 2 * self.G @ c + c @ self.G @ c).clamp_min(0).sqrt()


class UploadWeights(NamedTuple):
    """An aggregator's decision on every upload."""

    factors: Tensor  # (K,) of the client's weight; 0 leaves the upload out
    shrinkage: Tensor | None = None  # (K,) λ from 0 to 1: the update counts λ times, the served leaves 1 − λ times


@dataclass(frozen=True)
class RobustAggregator(ABC):
    """The ``[robust]`` table: one robust aggregator. ``attackers`` is the share of uploads that may be hostile.

    An aggregator of another package is a frozen dataclass that defines ``judge``; its own fields are further keys of
    the table and need defaults. ``judge`` depends on its argument only.
    """

    attackers: float = 0.3

    cite: ClassVar[str] = ""  # BibTeX of its paper
    weighs: ClassVar[bool] = False  # whether it sets weights, so that the method must be linear in them

    def __post_init__(self):
        if not 0 <= self.attackers < 0.5:
            raise ValueError(
                f"robust.attackers is {self.attackers}; it is a share from 0 to below 0.5, since a hostile majority "
                "looks like an honest one."
            )

    def check(self, method: Method, hidden: bool) -> None:
        """``ValueError`` if the aggregator cannot work with the method or with secure aggregation (``hidden``)."""
        if hidden:
            raise ValueError(
                "[robust] compares the clients' uploads, and flower.secure_aggregation hides them; leave one of the "
                "two out."
            )
        if self.weighs and method.weighs:
            raise ValueError(
                f"robust.name is an aggregator that weighs updates, but {method.title}'s server gives weights of its "
                "own; take one that selects (krum, multi-krum, trimmed, median-of-means), or another method."
            )

    def max_attackers(self, K: int) -> int:
        """``f``, the number of K uploads that may be hostile; at most the bound of Krum, ``2 f + 3 ≤ K``."""
        return max(0, min(int(self.attackers * K), (K - 3) // 2))

    @abstractmethod
    def judge(self, updates: UpdateGeometry) -> UploadWeights:
        """Decide on a round of at least three uploads."""


ENOUGH = 3  # uploads: of two, either one may be the outlier


def reweigh_uploads(
    aggregator: RobustAggregator | None, method: Method, rules: Rules, shared: Tree, uploads: Sequence[Received],
    number: int, seed: int,
) -> tuple[list[Received], Mapping[str, Any]]:  # fmt: skip
    """Return the uploads that the method combines, with their weights, and an entry for the round's record.

    With fewer than three uploads nothing is combined, since no upload could be checked.
    """
    if aggregator is None or not uploads:
        return list(uploads), {}
    ordered = sorted(uploads, key=lambda upload: upload.turn.client)
    if len(ordered) < ENOUGH:
        return [], {"kept": [], "why": f"{len(ordered)} uploads; a robust aggregator needs {ENOUGH}"}
    w = torch.tensor(shares(method, [u.examples for u in ordered]), dtype=torch.float64)
    updates = UpdateGeometry(gram_matrix(rules, shared, ordered), w, derive_seed(seed, "robust", number))
    factors, shrinkage = aggregator.judge(updates)
    kept = list[Received]()
    for upload, factor, share in zip(ordered, factors, torch.ones(len(ordered)) if shrinkage is None else shrinkage):
        kept += _weigh(rules, shared, upload, float(factor), float(share))
    record: dict[str, Any] = {"kept": [u.turn.client for u, c in zip(ordered, factors.tolist()) if c > 0]}
    if aggregator.weighs:
        weights = factors if shrinkage is None else shrinkage
        record["factors"] = {u.turn.client: c for u, c in zip(ordered, weights.tolist())}
    return kept, record


def _weigh(rules: Rules, shared: Tree, upload: Received, factor: float, share: float) -> list[Received]:
    """Give an upload its weight, and the rest of the weight to the leaves that were served.

    ``λ (S + D) + (1 − λ) S = S + λ D``: an update is scaled by mixing in its start, so no factor is rescaled, and any
    mean of uploads is a mean of the scaled updates.
    """
    if factor == 0:
        return []
    if share == 1.0:
        return [upload if factor == 1.0 else upload._replace(factor=factor)]
    start = build_upload_spec(rules, shared, upload.turn).start
    tree = {p: {leaf: start[p][leaf] for leaf in upload.tree[p]} for p in rules}
    return [upload._replace(factor=factor * share), upload._replace(tree=tree, factor=factor * (1 - share))]
