"""Text regression: one sentence or a pair, one number."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedlora.tasks._regression import Regression, quantile_bins
from fedlora.tasks._text import TextTask
from fedlora.tasks.data.labels import Classes, Targets
from fedlora.tasks.data.rows import read_numbers


@dataclass(frozen=True)
class TextRegression(Regression, TextTask):
    """The ``[task]`` table of text regression; ``label`` is the column of the number."""

    metric: str = "pearson"  # or "spearman" or "mse"
    bins: int = 10  # of equally many training rows: the labels for clients.partition

    def __post_init__(self):
        super().__post_init__()
        if self.bins < 1:
            raise ValueError(f"task.bins is {self.bins}; it must be at least 1.")

    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        numbers = (read_numbers(split, self.label, role) for split, role in ((train, "training"), (test, "test")))
        return Targets(*numbers, ("score",))

    def strata(self, known: Tensor, values: Tensor) -> Tensor:
        return quantile_bins(known, values, self.bins)
