"""Text regression: one sentence or a pair, one number."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.tasks._base import Batch
from fedlora.tasks._text import TextTask
from fedlora.tasks.data.labels import Classes, Targets
from fedlora.tasks.data.rows import read_numbers
from fedlora.tasks.metrics.scores import Scores, moments, spearman


@dataclass(frozen=True)
class TextRegression(TextTask):
    """The ``[task]`` table of text regression; ``label`` is the column of the number."""

    metric: str = "pearson"  # or "spearman" or "mse"
    bins: int = 10  # of equally many training rows: the labels for clients.partition
    metrics = ("pearson", "spearman", "mse")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 1:
            raise ValueError(f"task.bins is {self.bins}; it must be at least 1.")

    def targets(self, train: Any, test: Any, classes: Classes | None) -> Targets:
        numbers = (read_numbers(train, self.label, "training"), read_numbers(test, self.label, "test"))
        return Targets(numbers[0], numbers[1], self.known_labels())

    def strata(self, known: Tensor, values: Tensor) -> Tensor:
        return quantile_bins(known, values, self.bins)

    def known_labels(self) -> tuple[str, ...]:
        """Return the name of the head's one output."""
        return ("score",)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the mean squared error."""
        return functional.mse_loss(self.outputs(network, batch)[:, 0].float(), batch["labels"])

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        return functional.mse_loss(self.outputs(network, batch)[:, 0].float(), batch["labels"], reduction="none")

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return moments, squared errors, and Spearman's correlation times the number of rows.

        Each client ranks its own rows, so pooled over clients Spearman's correlation is a mean, weighted by rows.
        """
        x, y = outputs[:, 0].double(), labels.double()
        rows = len(y)
        squared = (float(((x - y) ** 2).sum()), rows)
        return Scores({**moments(x.tolist(), y.tolist()), "spearman": (rows * spearman(x, y), rows), "mse": squared})


def quantile_bins(known: Tensor, values: Tensor, bins: int) -> Tensor:
    """Return each value's bin (N,), int64; at most ``bins`` bins have about equally many ``known`` values."""
    ordered = known.sort().values
    places = (torch.arange(1, bins) * len(ordered)) // bins
    edges = ordered[places].unique()
    edges = edges[edges > ordered[0]]  # no empty first bin
    return torch.searchsorted(edges, values.contiguous(), right=True)
