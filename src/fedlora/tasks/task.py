"""What a kind of problem is to the library: rows, batches, a loss and scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = dict[str, Tensor]  # keyword arguments of the network, "labels" among them


@dataclass(frozen=True)
class Examples:
    """The rows of one split, encoded once."""

    features: Mapping[str, Tensor]
    labels: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64: tokens of each row, or 1
    groups: tuple[str, ...] | None = None  # each row's value of the natural client column

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Both splits, and what the labels are called."""

    train: Examples
    test: Examples
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Sums and counts, so that a report can take the mean over rows or over clients: ``{name: (sum, count)}``."""

    sums: Mapping[str, tuple[float, int]]


class Task(Protocol):
    """A frozen dataclass whose fields are the ``[task]`` table."""

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data: ...
    def network(self, model: str, labels: int, seed: int) -> nn.Module: ...
    def collate(self, examples: Examples, rows: Tensor) -> Batch: ...
    def loss(self, network: nn.Module, batch: Batch) -> Tensor: ...
    def outputs(self, network: nn.Module, batch: Batch) -> Tensor: ...
    def scores(self, outputs: Tensor, labels: Tensor) -> Scores: ...
    def probe(self, network: nn.Module) -> Batch: ...
    def preprocessor(self, model: str) -> Any: ...


class Classification:
    """Checks, loss and scores that text and image classification have in common."""

    train_rows: int | None
    test_rows: int | None

    def __post_init__(self):
        for key in ("train_rows", "test_rows"):
            rows = getattr(self, key)
            if rows is not None and rows < 1:
                raise ValueError(f"task.{key} is {rows}; it must be at least 1, or left out for all rows.")

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch, in float32 whatever the network runs in."""
        return functional.cross_entropy(self.outputs(network, batch).float(), batch["labels"])

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Logits, rows by labels."""
        return network(**{name: x for name, x in batch.items() if name != "labels"}).logits

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Accuracy and cross-entropy."""
        right = int((outputs.argmax(-1) == labels).sum())
        loss = float(functional.cross_entropy(outputs.double(), labels, reduction="sum"))
        return Scores({"accuracy": (right, len(labels)), "loss": (loss, len(labels))})


def lengths_of_one(rows: int) -> Tensor:
    """For rows that are all equally long."""
    return torch.ones(rows, dtype=torch.int64)
