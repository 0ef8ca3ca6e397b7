"""Text regression: one sentence or a pair, one number."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedlora.tasks._regression import Regression, quantile_bins
from fedlora.tasks._text import Texts
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.labels import Classes, Targets


@dataclass(frozen=True)
class TextRegression(Regression, Texts):
    """The ``[task]`` table of text regression; ``label`` is the column of the number."""

    metric: str = "pearson"  # or "spearman" or "mse"
    bins: int = 10  # of equally many training rows: what clients.partition takes for labels

    def __post_init__(self):
        super().__post_init__()
        if self.bins < 1:
            raise ValueError(f"task.bins is {self.bins}; it must be at least 1.")

    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        """Numbers, float32; their one name is the head's one output."""
        both = (source.numbers(split, self.label, what) for split, what in ((train, "training"), (test, "test")))
        return Targets(*both, ("score",))

    def strata(self, known: Tensor, values: Tensor) -> Tensor:
        """Which quantile of the training rows' numbers a number lies in."""
        return quantile_bins(known, values, self.bins)
