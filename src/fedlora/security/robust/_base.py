"""What a robust rule is: it sees how the clients' updates lie to each other, and says which uploads count, how much.

All that it sees is the ``K × K`` matrix of inner products of the updates (``updates.gram``), so no rule knows of
factors, and no client changes its own standing by rescaling or turning its pair. What a rule says goes to the method's
own ``combine``: uploads are left out, weighted anew, or pulled towards what was served.
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
from fedlora.security.validation.expected import expected
from fedlora.security.validation.update_norms import gram
from fedlora.seeds import derived
from fedlora.types import Tree


class Seen(NamedTuple):
    """What a rule knows of a round of ``K`` uploads, in the order of the clients."""

    G: Float[Tensor, "K K"]  # inner products of the updates, float64
    w: Float[Tensor, "K"]  # the clients' shares, which sum to one
    seed: int  # of this round

    @property
    def norms(self) -> Tensor:
        """``‖D_k‖``."""
        return self.G.diagonal().clamp_min(0).sqrt()

    @property
    def squares(self) -> Tensor:
        """``‖D_k − D_l‖²``, K by K."""
        own = self.G.diagonal()
        return (own[:, None] + own[None, :] - 2 * self.G).clamp_min(0)

    def away(self, c: Tensor) -> Tensor:
        """``‖D_k − Σ c_l D_l‖`` for every k."""
        found: Tensor = (self.G.diagonal() - 2 * self.G @ c + c @ self.G @ c).clamp_min(0).sqrt()
        return found


class Verdict(NamedTuple):
    """A rule's word on every upload."""

    factors: Tensor  # (K,) of its share; 0 leaves it out
    pulled: Tensor | None = None  # (K,) λ from 0 to 1: its update counts λ times, and what was served the rest


@dataclass(frozen=True)
class Defence(ABC):
    """The ``[robust]`` table: one rule. ``attackers`` is the share of a round's uploads that may be hostile.

    A rule of another package is a frozen dataclass that defines ``judge``; its own fields are further keys of the table
    and need defaults. ``judge`` depends on its argument only.
    """

    attackers: float = 0.3

    cite: ClassVar[str] = ""  # BibTeX of its paper
    weighs: ClassVar[bool] = False  # does it give weights of its own, so that the method must be linear in them?

    def __post_init__(self):
        if not 0 <= self.attackers < 0.5:
            raise ValueError(
                f"robust.attackers is {self.attackers}; it is a share from 0 to below 0.5, since nobody can tell a "
                "hostile majority from an honest one."
            )

    def check(self, method: Method, hidden: bool) -> None:
        """``ValueError`` where the rule cannot work, or would not do what its name says."""
        if hidden:
            raise ValueError(
                "[robust] compares the clients' uploads, and flower.secure_aggregation hides them; leave one of the "
                "two out."
            )
        if self.weighs and method.weighs:
            raise ValueError(
                f"robust.name is a rule that weighs updates, but {method.title}'s server gives weights of its own; "
                "take a rule that selects (krum, multi-krum, trimmed, median-of-means), or another method."
            )

    def hostile(self, K: int) -> int:
        """``f``: how many of K uploads may be hostile; at most what a rule by neighbours stands, ``2 f + 3 ≤ K``."""
        return max(0, min(int(self.attackers * K), (K - 3) // 2))

    @abstractmethod
    def judge(self, seen: Seen) -> Verdict:
        """The verdict on a round of at least three uploads."""


ENOUGH = 3  # uploads; of two, no rule can say which is the odd one


def defended(
    rule: Defence | None,
    method: Method,
    rules: Rules,
    shared: Tree,
    uploads: Sequence[Received],
    number: int,
    seed: int,
) -> tuple[list[Received], Mapping[str, Any]]:
    """What the method combines of a round's uploads, and the rule's word for the round's record.

    With fewer than three uploads nothing is combined: to take them unseen would be no defence.
    """
    if rule is None or not uploads:
        return list(uploads), {}
    ordered = sorted(uploads, key=lambda upload: upload.turn.client)
    if len(ordered) < ENOUGH:
        return [], {"kept": [], "why": f"{len(ordered)} uploads; a robust rule needs {ENOUGH}"}
    w = torch.tensor(shares(method, [u.examples for u in ordered]), dtype=torch.float64)
    seen = Seen(gram(rules, shared, ordered), w, derived(seed, "robust", number))
    factors, pulled = rule.judge(seen)
    found: list[Received] = []
    for upload, factor, share in zip(ordered, factors.tolist(), _ones(factors) if pulled is None else pulled.tolist()):
        found += _counted(rules, shared, upload, factor, share)
    record: dict[str, Any] = {"kept": [u.turn.client for u, c in zip(ordered, factors.tolist()) if c > 0]}
    if rule.weighs:
        record["factors"] = {
            u.turn.client: c for u, c in zip(ordered, (pulled if pulled is not None else factors).tolist())
        }
    return found, record


def _ones(like: Tensor) -> list[float]:
    return [1.0] * len(like)


def _counted(rules: Rules, shared: Tree, upload: Received, factor: float, share: float) -> list[Received]:
    """An upload with its weight, and beside it what was served with the rest of that weight.

    ``λ (S + D) + (1 − λ) S = S + λ D``: an update is scaled by mixing in the start that it is a change of. No factor is
    rescaled, and every method that takes a mean of what it gets takes it of exactly these.
    """
    if factor == 0:
        return []
    if share == 1.0:
        return [upload if factor == 1.0 else upload._replace(factor=factor)]
    start = expected(rules, shared, upload.turn).start
    tree = {p: {leaf: start[p][leaf] for leaf in upload.tree[p]} for p in rules}
    return [upload._replace(factor=factor * share), upload._replace(tree=tree, factor=factor * (1 - share))]
