"""The ``[hygiene]`` table: what an upload may be at most, and how often a client may fail."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

Claim = TypeVar("Claim", int, float)
CLAIMS = 100  # times the median of a round: more rows than that, nobody is believed who sets no cap
ENOUGH = 3  # uploads that a median needs: of two, nobody can say which one is odd


@dataclass(frozen=True)
class Hygiene:
    """Always on. The limits are wide: they stop what is broken or absurd, not a careful attacker ([robust] does)."""

    norm_limit: float = 10.0  # an update's norm, in medians of the round; also of one weight's factors
    factor_limit: float = 3.0  # how much farther than its update explains the factors may move, in medians
    strikes: int = 3  # rounds in which a client may be quarantined before it is left out; 0: any number
    most_examples: int | None = None  # rows that a client can claim at most; None: 100 medians of the round
    keep_files: int = 20  # bad uploads kept in the run's folder
    keep_mb: float = 256.0  # and their size together

    def __post_init__(self):
        for key in ("norm_limit", "factor_limit"):
            if not getattr(self, key) > 1:
                raise ValueError(f"hygiene.{key} is {getattr(self, key)}; it is a number of medians above 1.")
        if self.most_examples is not None and self.most_examples < 1:
            raise ValueError(f"hygiene.most_examples is {self.most_examples}; it must be at least 1 row.")
        for key in ("strikes", "keep_files", "keep_mb"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"hygiene.{key} is {getattr(self, key)}; it cannot be negative or without end.")

    def capped(self, claims: Sequence[Claim]) -> list[Claim]:
        """The rows that each client of a round is believed to have; somebody else's app may weigh by fractions."""
        most: float | None = self.most_examples
        if most is None:
            most = CLAIMS * median(claims) if len(claims) >= ENOUGH else max(claims, default=1)
        return [claim if claim <= most else type(claim)(most) for claim in claims]
