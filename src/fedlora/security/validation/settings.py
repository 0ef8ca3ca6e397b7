"""The ``[validation]`` table: limits of an upload, and the number of failures until a client is left out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

Claim = TypeVar("Claim", int, float)
CLAIMS = 100  # medians of the round: the largest number of rows that counts if no cap is set
ENOUGH = 3  # uploads that a median needs: of two, either one may be the outlier


@dataclass(frozen=True)
class Validation:
    """Always on. The limits are wide: they stop broken or absurd uploads, not a careful attacker ([robust] does)."""

    norm_limit: float = 10.0  # an update's norm, in medians of the round; also of one weight's factors
    factor_limit: float = 3.0  # movement of the factors, in medians, beyond the movement that its update explains
    strikes: int = 3  # rounds with a rejected upload after which a client is left out; 0: any number
    most_examples: int | None = None  # rows that a client can claim at most; None: 100 medians of the round
    keep_files: int = 20  # rejected uploads kept in the run's folder
    keep_mb: float = 256.0  # of these files together

    def __post_init__(self):
        for key in ("norm_limit", "factor_limit"):
            if not getattr(self, key) > 1:
                raise ValueError(f"validation.{key} is {getattr(self, key)}; it is a number of medians above 1.")
        if self.most_examples is not None and self.most_examples < 1:
            raise ValueError(f"validation.most_examples is {self.most_examples}; it must be at least 1 row.")
        for key in ("strikes", "keep_files", "keep_mb"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"validation.{key} is {getattr(self, key)}; it cannot be negative or infinite.")

    def cap_examples(self, claims: Sequence[Claim]) -> list[Claim]:
        """Cap the numbers of rows that the clients of a round claim; a Flower app's may be fractions."""
        most: float | None = self.most_examples
        if most is None:
            most = CLAIMS * median(claims) if len(claims) >= ENOUGH else max(claims, default=1)
        return [claim if claim <= most else type(claim)(most) for claim in claims]
