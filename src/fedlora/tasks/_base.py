"""What a kind of problem is to the library: rows, batches, a loss and scores."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.tasks.data.labels import Classes, check_names
from fedlora.tasks.metrics.scores import Scores

Batch = dict[str, Tensor]  # keyword arguments of the network, "labels" among them


@dataclass(frozen=True)
class Examples:
    """The rows of one split, encoded once."""

    features: Mapping[str, Tensor]
    labels: Tensor  # (N,) int64, or float32 where the target is a number
    lengths: Tensor  # (N,) int64: tokens of each row, or 1
    groups: tuple[str, ...] | None = None  # each row's value of the natural client column
    strata: Tensor | None = None  # (N,) int64: what partitions by label go by; None: the labels
    texts: tuple[Mapping[str, Any], ...] | None = None  # each row's own words, for tasks that grade answers
    sets: Tensor | None = None  # (N,) int64: which of several test sets a row is of; None: there is one

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kinds(self) -> Tensor:
        """(N,) int64: what partitions by label, and test rows that follow training rows, go by."""
        return self.labels if self.strata is None else self.strata


@dataclass(frozen=True)
class Data:
    """Both splits, and what the labels are called."""

    train: Examples
    test: Examples
    label_names: tuple[str, ...]  # empty where a row has no label
    notes: tuple[str, ...] = ()  # what a user should be told of how the rows were read
    reading: str = ""  # how labels were matched with ``label_names``, one of labels.READINGS


@dataclass(frozen=True)
class Shard:
    """The rows of one client, as indices into ``Data.train`` and ``Data.test``."""

    train: Tensor  # (n,) int64
    test: Tensor  # (m,) int64
    relabel: Tensor | None = None  # (labels,) int64: relabel[y] is this client's name for class y; None: y itself


class Task(Protocol):
    """A frozen dataclass whose fields are the ``[task]`` table."""

    auto: ClassVar[str]  # the class of transformers that loads the network
    peft: ClassVar[str | None]  # PEFT's name for the kind of network, where an export says one
    quantizes: ClassVar[bool]  # whether ``network`` takes what loads a quantised base
    brings_head: ClassVar[bool]  # whether the checkpoint has the whole network, so that nothing on top is new
    metric: str  # the figure that is reported first, one of metrics.KNOWN

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Both splits, encoded for ``model``; ``client_column`` is the column that goes into ``Examples.groups``."""

    def network(self, model: str, labels: int, seed: int, **loading: Any) -> nn.Module:
        """The pretrained network; new weights are drawn from ``seed``, and ``labels`` is 0 where rows have none."""

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Rows as keyword arguments of the network."""

    def augmented(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        """The same for a step of training."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch: a scalar, differentiable."""

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's own loss (b,), whatever the other rows are."""

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """What is scored of a batch, one entry a row."""

    def graded(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """``outputs`` of some rows, moved to ``device`` in batches."""

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Sums of figures over rows, from what ``graded`` returned; ``metric`` is one of them or made of them."""

    def agreed(self) -> tuple[str, ...] | None:
        """The labels, if they are known without any rows; else None."""

    def all_labels(self) -> tuple[str, ...]:
        """The labels that the configuration names; empty: none."""

    def probe(self, network: nn.Module) -> Batch:
        """A small batch without labels that depends on nothing else, to compare two networks on."""

    def preprocessor(self, model: str) -> Any:
        """A tokenizer or processor to save beside the network; None: the model has none."""


class Supervised(ABC):
    """The base class of tasks: what all tasks on rows have in common.

    A task of another package is a frozen dataclass that extends this class, or ``Classification`` with its loss and
    scores, and defines the rest of ``Task``. Its fields are the ``[task]`` table, and ``metric``, ``train_rows`` and
    ``test_rows`` are among them. A setting in which the parties may differ, such as the place of the data, is annotated
    ``schema.PerMachine``. Loading twice must give the same rows.
    """

    peft: ClassVar[str | None] = None
    quantizes: ClassVar[bool] = False
    brings_head: ClassVar[bool] = False
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

    def fits(self, labels: int) -> None:  # noqa: B027 - most tasks fit any number
        """``ValueError`` where the metric is not one of so many labels: said before anything is trained."""

    def all_labels(self) -> tuple[str, ...]:
        """The labels that the configuration names, those included of which no rows are kept; empty: it names none."""
        return ()

    @abstractmethod
    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """What is scored of a batch, one entry a row."""

    @abstractmethod
    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Rows as keyword arguments of the network."""

    def augmented(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        """The same for a step of training, which a task may vary by ``draws``, on the CPU."""
        return self.collate(examples, rows)

    def graded(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """What ``scores`` is made of, for some rows at once: a fixed number of figures a row."""
        batch = {name: x.to(device) for name, x in self.collate(examples, rows).items()}
        return self.outputs(network, batch)


class Classification(Supervised):
    """Loss and scores that text and image classification have in common."""

    metrics = ("accuracy", "f1", "matthews", "macro_f1")
    label_names: list[str] | None
    labels: list[int | str] | None

    def __post_init__(self):
        super().__post_init__()
        check_names(self.label_names)
        if self.label_names and len(self.label_names) < 2:
            raise ValueError("task.label_names has only 1 label; a classification needs at least 2.")
        self.agreed()  # labels that are kept and have no name are said at once

    def agreed(self) -> tuple[str, ...] | None:
        """The labels, where they are known without any rows."""
        return Classes(self.all_labels(), True).keeping(self.labels).outputs if self.label_names else None

    def all_labels(self) -> tuple[str, ...]:
        """All of ``label_names``."""
        return tuple(self.label_names or ())

    def fits(self, labels: int) -> None:
        """``ValueError`` where the metric is of two labels and there are more."""
        if self.metric in ("f1", "matthews") and labels != 2:
            raise ValueError(
                f"task.metric is {self.metric!r}, which is of two labels; there are {labels}: take 'macro_f1' or "
                "'accuracy'."
            )

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch, in float32 whatever the network runs in."""
        return functional.cross_entropy(self.outputs(network, batch).float(), batch["labels"])

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Each row's own loss (b,), whatever the other rows are."""
        return functional.cross_entropy(self.outputs(network, batch).float(), batch["labels"], reduction="none")

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Logits, rows by labels."""
        return logits(network, batch)

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Accuracy and cross-entropy; for another metric, the table of hits and misses that it is made of."""
        found, rows = outputs.argmax(-1), len(labels)
        loss = float(functional.cross_entropy(outputs.double(), labels, reduction="sum"))
        sums = {"accuracy": (int((found == labels).sum()), rows), "loss": (loss, rows)}
        return Scores(sums | self._table(found, labels, outputs.shape[-1]))

    def _table(self, found: Tensor, labels: Tensor, count: int) -> dict[str, tuple[float, int]]:
        if self.metric == "accuracy":
            return {}
        if self.metric == "macro_f1":
            return {
                f"{name}.{label}": total
                for label in range(count)
                for name, total in confusion(found == label, labels == label).items()
            }
        self.fits(count)
        return confusion(found == 1, labels == 1)


def confusion(found: Tensor, there: Tensor) -> dict[str, tuple[int, int]]:
    """Hits, false alarms and misses of one label, each over the number of rows."""
    table = {"tp": found & there, "fp": found & ~there, "fn": ~found & there}
    return {name: (int(hits.sum()), len(hits)) for name, hits in table.items()}


def logits(network: nn.Module, batch: Batch) -> Tensor:
    """What the network's head makes of a batch, rows by outputs."""
    found: Tensor = network(**{name: x for name, x in batch.items() if name != "labels"}).logits
    return found


def lengths_of_one(rows: int) -> Tensor:
    """For rows that are all equally long."""
    return torch.ones(rows, dtype=torch.int64)
