"""What combining finished adapters cost, weight by weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Relative errors against the exact mean, weight by weight and over all weights."""

    weights: dict[str, Mapping[str, float]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    rest_ranks: dict[str, int] = field(default_factory=dict)

    def total(self, name: str) -> float | None:
        """``√Σ ‖error‖² / √Σ ‖W*‖²`` over all weights."""
        rows = [row for row in self.weights.values() if name in row]
        squares = sum(row["norm"] ** 2 for row in rows)
        return (sum((row[name] * row["norm"]) ** 2 for row in rows) / squares) ** 0.5 if squares else None

    def as_table(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "error": self.total("served"),
            "error_fedit": self.total("fedit"),
            "ranks": sorted(set(self.ranks.values())),
            "residual_ranks": sorted(set(self.rest_ranks.values())),
            "weights": {part: dict(row) for part, row in self.weights.items()},
        }
