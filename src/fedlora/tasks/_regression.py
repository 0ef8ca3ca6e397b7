"""Loss and scores of tasks whose target is a number."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.tasks._base import Batch, Supervised, logits
from fedlora.tasks.metrics.scores import Scores, moments, spearman


class Regression(Supervised):
    """Mean squared error in training; Pearson's and Spearman's correlation in evaluation."""

    metrics = ("pearson", "spearman", "mse")

    def agreed(self) -> tuple[str, ...] | None:
        """The name of the head's one output: known without any rows."""
        return ("score",)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error over the batch, in float32 whatever the network runs in."""
        return functional.mse_loss(self.outputs(network, batch)[:, 0].float(), batch["labels"])

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's squared error (b,)."""
        return functional.mse_loss(self.outputs(network, batch)[:, 0].float(), batch["labels"], reduction="none")

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Predictions, rows by 1."""
        return logits(network, batch)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Moments, squared error, and the rank correlation of these rows times their number.

        Spearman's is of each client's own ranks: pooled over clients it is their mean by rows, since ranks over all
        clients' rows would need the rows.
        """
        x, y = outputs[:, 0].double(), labels.double()
        rows = len(y)
        squared = (float(((x - y) ** 2).sum()), rows)
        return Scores({**moments(x.tolist(), y.tolist()), "spearman": (rows * spearman(x, y), rows), "mse": squared})


def quantile_bins(known: Tensor, values: Tensor, bins: int) -> Tensor:
    """Each value's bin among at most ``bins`` of about equally many ``known`` values; (N,) int64.

    Equal values share a bin, so that many equal ones make fewer bins.
    """
    ordered = known.sort().values
    places = (torch.arange(1, bins) * len(ordered)) // bins
    edges = ordered[places].unique()
    edges = edges[edges > ordered[0]]  # below it there is nothing
    return torch.searchsorted(edges, values.contiguous(), right=True)
