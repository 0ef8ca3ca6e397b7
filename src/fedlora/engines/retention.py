"""The ``[checkpoint]`` table: how often a run is saved, and what of it is kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.tasks.metrics.scores import KNOWN


@dataclass(frozen=True)
class Retention:
    """The ``[checkpoint]`` table. The last round is always saved."""

    keep: int = 3  # the last so many checkpoints; an older one stands in where the newest is damaged
    every: int = 1  # rounds from one to the next
    best: Literal["global", "clients"] | None = None  # also keep the best round's, by the task's metric

    def __post_init__(self) -> None:
        for key in ("keep", "every"):
            if getattr(self, key) < 1:
                raise ValueError(f"checkpoint.{key} is {getattr(self, key)}; it must be at least 1.")

    def check(self, personal: bool, title: str) -> None:
        """``ValueError`` where the best is asked for by a model that there is not."""
        if self.best == "global" and personal:
            raise ValueError(
                f"checkpoint.best is 'global', but {title} has no global model; set it to 'clients', for their mean."
            )

    def value(self, record: Mapping[str, Any], metric: str) -> float | None:
        """What a round is worth; None where it was not evaluated, or is not to be compared."""
        scores = record.get(self.best) if self.best is not None else None
        if scores is None:
            return None
        value = float(scores["mean"] if self.best == "clients" else scores[metric])
        return value if math.isfinite(value) else None

    def better(self, value: float | None, best: float | None, metric: str) -> bool:
        """Whether a round is better than the best before; of equal rounds the first stays."""
        if value is None or best is None:
            return value is not None
        return value > best if KNOWN[metric].higher else value < best
