"""The types of one adapted weight and of one client's turn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

Layer = Mapping[str, Tensor]  # the leaves of one adapted weight, e.g. {"A": (r, n), "B": (m, r)}
Tree = Mapping[str, Layer]  # part of the model -> its leaves


class Factors(NamedTuple):
    """A weight update as a product, ``ΔW = U @ V``, including every scale."""

    U: Float[Tensor, "*stack m r"]
    V: Float[Tensor, "*stack r n"]

    def dense(self) -> Float[Tensor, "*stack m n"]:
        """Return the update as one matrix; for tests and small weights only."""
        return self.U @ self.V


@dataclass(frozen=True)
class Turn:
    """One client's part in one round."""

    round: int  # from 0
    client: int  # from 0
    rank: int  # the client's budget: its LoRA rank, or its number of Ravan heads
    seed: int = 0  # of this client in this round


class Work(NamedTuple):
    """One client's training of one weight."""

    start: Layer
    end: Layer
    trained: frozenset[str]


class Upload(NamedTuple):
    """One client's upload of one weight at the end of a round."""

    turn: Turn
    weight: float  # the client's share of the cohort; shares sum to one
    layer: Layer


@dataclass(frozen=True)
class Outcome:
    """The result of a round for one weight: the next shared leaves, and updates to add to the base.

    ``notes`` are the method's own figures of this round (name -> one value per weight), for reports.
    """

    layer: Layer
    base_update: tuple[Factors, ...] = ()
    notes: Mapping[str, Tensor] = field(default_factory=dict)
