"""What a kind of problem is to the library: rows, batches, a loss and scores."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.metrics import Scores

Batch = dict[str, Tensor]  # keyword arguments of the network, "labels" among them


@dataclass(frozen=True)
class Examples:
    """The rows of one split, encoded once."""

    features: Mapping[str, Tensor]
    labels: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64: tokens of each row, or 1
    groups: tuple[str, ...] | None = None  # each row's value of the natural client column
    strata: Tensor | None = None  # (N,) int64: what splits by label go by; None: the labels
    texts: tuple[Mapping[str, Any], ...] | None = None  # each row's own words, for tasks that grade answers

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kinds(self) -> Tensor:
        """(N,) int64: what splits by label, and test rows that follow training rows, go by."""
        return self.labels if self.strata is None else self.strata


@dataclass(frozen=True)
class Data:
    """Both splits, and what the labels are called."""

    train: Examples
    test: Examples
    label_names: tuple[str, ...]  # empty where a row has no label
    notes: tuple[str, ...] = ()  # what a user should be told of how the rows were read


class Task(Protocol):
    """A frozen dataclass whose fields are the ``[task]`` table."""

    auto: ClassVar[str]  # the class of transformers that loads the network
    peft: ClassVar[str | None]  # PEFT's name for the kind of network, where an export says one
    metric: str  # the figure that is reported first, one of metrics.KNOWN

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data: ...
    def network(self, model: str, labels: int, seed: int) -> nn.Module: ...
    def collate(self, examples: Examples, rows: Tensor) -> Batch: ...
    def loss(self, network: nn.Module, batch: Batch) -> Tensor: ...
    def outputs(self, network: nn.Module, batch: Batch) -> Tensor: ...
    def graded(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor: ...
    def scores(self, outputs: Tensor, labels: Tensor) -> Scores: ...
    def agreed(self) -> tuple[str, ...] | None: ...
    def probe(self, network: nn.Module) -> Batch: ...
    def preprocessor(self, model: str) -> Any: ...


class Supervised(ABC):
    """What all tasks on rows have in common."""

    peft: ClassVar[str | None] = None
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)  # that ``task.metric`` may name
    metric: str
    train_rows: int | None
    test_rows: int | None

    def __post_init__(self):
        for key in ("train_rows", "test_rows"):
            rows = getattr(self, key)
            if rows is not None and rows < 1:
                raise ValueError(f"task.{key} is {rows}; it must be at least 1, or left out for all rows.")
        if self.metric not in self.metrics:
            raise ValueError(f"task.metric is {self.metric!r}; here it is {' or '.join(map(repr, self.metrics))}.")

    @abstractmethod
    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """What is scored of a batch, one entry a row."""

    @abstractmethod
    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Rows as keyword arguments of the network."""

    def graded(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """What ``scores`` is made of, for some rows at once: a fixed number of figures a row."""
        batch = {name: x.to(device) for name, x in self.collate(examples, rows).items()}
        return self.outputs(network, batch)


class Classification(Supervised):
    """Loss and scores that text and image classification have in common."""

    metrics = ("accuracy", "f1", "matthews")
    label_names: list[str] | None

    def agreed(self) -> tuple[str, ...] | None:
        """The labels, where they are known without any rows."""
        return tuple(self.label_names) if self.label_names else None

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch, in float32 whatever the network runs in."""
        return functional.cross_entropy(self.outputs(network, batch).float(), batch["labels"])

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Logits, rows by labels."""
        return network(**{name: x for name, x in batch.items() if name != "labels"}).logits

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Accuracy and cross-entropy; with two labels and a metric of them, the table of hits and misses."""
        found, rows = outputs.argmax(-1), len(labels)
        loss = float(functional.cross_entropy(outputs.double(), labels, reduction="sum"))
        sums = {"accuracy": (int((found == labels).sum()), rows), "loss": (loss, rows)}
        if self.metric != "accuracy":
            if outputs.shape[-1] != 2:
                raise ValueError(
                    f"task.metric is {self.metric!r}, which is of two labels; there are {outputs.shape[-1]}."
                )
            table = {"tp": (found == 1) & (labels == 1), "fp": (found == 1) & (labels == 0)}
            table["fn"] = (found == 0) & (labels == 1)
            sums |= {name: (int(hits.sum()), rows) for name, hits in table.items()}
        return Scores(sums)


def lengths_of_one(rows: int) -> Tensor:
    """For rows that are all equally long."""
    return torch.ones(rows, dtype=torch.int64)
