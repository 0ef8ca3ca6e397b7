"""The vocabulary: what one adapted weight is made of, and what one client's turn is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

Layer = Mapping[str, Tensor]  # the leaves of one adapted weight, e.g. {"A": (r, n), "B": (m, r)}
Tree = Mapping[str, Layer]  # part of the model -> its leaves


class Factors(NamedTuple):
    """A weight update kept as a product, ``ΔW = U @ V``, with every scale folded in."""

    U: Float[Tensor, "*stack m r"]
    V: Float[Tensor, "*stack r n"]

    def dense(self) -> Float[Tensor, "*stack m n"]:
        """The update written out; for tests and small weights only."""
        return self.U @ self.V


@dataclass(frozen=True)
class Turn:
    """One client's part in one round."""

    round: int  # from 0
    client: int  # from 0
    rank: int  # the client's budget: its LoRA rank, or how many Ravan heads it can train
    seed: int = 0  # of this client in this round


class Work(NamedTuple):
    """What one client did to one weight."""

    start: Layer
    end: Layer
    trained: frozenset[str]


class Upload(NamedTuple):
    """What the server holds of one client at the end of a round."""

    turn: Turn
    weight: float  # the client's share of the cohort; shares sum to one
    layer: Layer


@dataclass(frozen=True)
class Outcome:
    """What a round makes of one weight: the next shared leaves, and what to add to the base.

    ``notes`` are the method's own figures about this round (name -> one number a weight), for reports.
    """

    layer: Layer
    base_update: tuple[Factors, ...] = ()
    notes: Mapping[str, Tensor] = field(default_factory=dict)
