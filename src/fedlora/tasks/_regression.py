"""Loss and scores of tasks that predict a number."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.tasks._base import Batch, Task, compute_logits
from fedlora.tasks.metrics.scores import Scores, moments, spearman


class Regression(Task):
    """Mean squared error in training; Pearson's and Spearman's correlation in evaluation."""

    metrics = ("pearson", "spearman", "mse")

    def known_labels(self) -> tuple[str, ...] | None:
        """Return the name of the head's one output."""
        return ("score",)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return functional.mse_loss(self.outputs(network, batch)[:, 0].float(), batch["labels"])

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        return functional.mse_loss(self.outputs(network, batch)[:, 0].float(), batch["labels"], reduction="none")

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        return compute_logits(network, batch)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return moments, squared errors, and Spearman's correlation times the number of rows.

        Each client ranks its own rows, because common ranks would need all clients' rows. Pooled over clients,
        Spearman's correlation is therefore their mean, weighted by rows.
        """
        x, y = outputs[:, 0].double(), labels.double()
        rows = len(y)
        squared = (float(((x - y) ** 2).sum()), rows)
        return Scores({**moments(x.tolist(), y.tolist()), "spearman": (rows * spearman(x, y), rows), "mse": squared})


def quantile_bins(known: Tensor, values: Tensor, bins: int) -> Tensor:
    """Return each value's bin (N,), int64, among at most ``bins`` bins of about equally many ``known`` values.

    Equal values share a bin, so there may be fewer bins.
    """
    ordered = known.sort().values
    places = (torch.arange(1, bins) * len(ordered)) // bins
    edges = ordered[places].unique()
    edges = edges[edges > ordered[0]]  # no empty first bin
    return torch.searchsorted(edges, values.contiguous(), right=True)
