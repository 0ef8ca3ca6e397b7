"""The interface of tasks: rows, batches, a loss and scores."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from fedlora.schema import PerMachine
from fedlora.tasks.data.labels import Classes, check_names
from fedlora.tasks.data.rows import Splits, draw_rows, load_splits, text_format
from fedlora.tasks.data.token_budget import batch_sizes
from fedlora.tasks.metrics.scores import Scores, is_higher_better

Batch = dict[str, Tensor]  # keyword arguments of the network, "labels" among them


@dataclass(frozen=True)
class Examples:
    """The rows of one split, encoded once."""

    features: Mapping[str, Tensor]
    labels: Tensor  # (N,) int64, or float32 for a regression
    lengths: Tensor  # (N,) int64: tokens of each row, or 1
    groups: tuple[str, ...] | None = None  # each row's value of the natural client column
    strata: Tensor | None = None  # (N,) int64: for partitions by label; None: the labels
    texts: tuple[Mapping[str, Any], ...] | None = None  # each row's texts, for tasks that grade answers
    sets: Tensor | None = None  # (N,) int64: each row's test set, if there are several
    reference: Tensor | None = None  # (N, ...): the pretrained network's values of each row, if the task needs them

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def partition_labels(self) -> Tensor:
        """(N,) int64: the labels for partitions by label, and for test rows that follow the training rows."""
        return self.labels if self.strata is None else self.strata


@dataclass(frozen=True)
class Data:
    """Both splits and the names of the labels."""

    train: Examples
    test: Examples
    label_names: tuple[str, ...]  # empty if rows have no labels
    notes: tuple[str, ...] = ()  # messages for the user about how the rows were read
    reading: str = ""  # how labels were matched with ``label_names``, one of labels.READINGS


@dataclass(frozen=True)
class Shard:
    """The rows of one client, as indices into ``Data.train`` and ``Data.test``."""

    train: Tensor  # (n,) int64
    test: Tensor  # (m,) int64
    relabel: Tensor | None = None  # (labels,) int64: relabel[y] is this client's label for class y; None: y itself


class Task(ABC):
    """The base class of tasks.

    A task of another package is a frozen dataclass that extends this class, or ``Classification`` with its loss and
    scores. Its fields are the ``[task]`` table, and ``metric``, ``train_rows`` and ``test_rows`` are among them. A
    setting in which the machines may differ, such as the path of the data, is annotated ``schema.PerMachine``. Loading
    twice must give the same rows.
    """

    auto: ClassVar[str]  # the class of transformers that loads the network
    peft: ClassVar[str | None] = None  # PEFT's task type, for exports
    quantizes: ClassVar[bool] = False  # whether its base may be quantised
    accepts_loading: ClassVar[bool] = False  # whether ``network`` accepts ``loading``, options of ``from_pretrained``
    brings_head: ClassVar[bool] = False  # whether the checkpoint has the whole network, so that no head is new
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)  # the values that ``task.metric`` may have
    scores_rows: ClassVar[bool] = False  # whether it scores by ``score_rows``, instead of outputs that are kept a row
    needs_reference: ClassVar[bool] = False  # whether its loss compares with the pretrained network's ``reference``
    is_own_code: ClassVar[bool] = False  # whether model and data are Python objects of the caller
    metric: str  # the main metric: a key of scores.KNOWN_METRICS, or a name of the task's own
    train_rows: int | None
    test_rows: int | None

    def __post_init__(self) -> None:
        for key in ("train_rows", "test_rows"):
            rows = getattr(self, key)
            if rows is not None and rows < 1:
                raise ValueError(f"task.{key} is {rows}; it must be at least 1, or left out for all rows.")
        if self.metric not in self.metrics:
            raise ValueError(f"task.metric is {self.metric!r}; here it is {' or '.join(map(repr, self.metrics))}.")

    @property
    def is_higher_better(self) -> bool:
        """Whether higher values of the main metric are better."""
        return is_higher_better(self.metric)

    @property
    def losses_obstacle(self) -> str | None:
        """The reason why ``losses`` cannot be computed, in one sentence; None if it can."""
        return None

    @abstractmethod
    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Return both splits, encoded for ``model``; ``client_column`` is the column for ``Examples.groups``."""

    @abstractmethod
    def network(self, model: str, labels: int, seed: int) -> nn.Module:
        """Return the pretrained network. New weights are drawn from ``seed``; ``labels`` is 0 if rows have none."""

    @abstractmethod
    def known_labels(self) -> tuple[str, ...] | None:
        """Return the labels if they are known without rows, else None."""

    def all_labels(self) -> tuple[str, ...]:
        """Return the labels that the configuration names, including those without rows; empty if it names none."""
        return ()

    def check_labels(self, labels: int) -> None:  # noqa: B027 - most tasks accept any number
        """Raise ``ValueError`` if the metric cannot be computed for this number of labels."""

    @abstractmethod
    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Return rows as keyword arguments of the network."""

    def collate_for_training(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        """Return rows for a training step; a task may augment them with random numbers from ``draws``, on the CPU."""
        return self.collate(examples, rows)

    def padded_lengths(self, examples: Examples, rows: Tensor) -> Tensor | None:
        """Return the tokens of some rows' sequences (b, s), each padded to its longest in a batch; None: no tokens."""
        return None

    def split_by_tokens(self, examples: Examples, rows: Tensor, max_tokens: int) -> list[Tensor]:
        """Return the rows of a training batch in batches of at most ``max_tokens`` tokens, padding included.

        A longer row is a batch of its own. The rows are in the order given if all of them fit into one batch.
        """
        lengths = self.padded_lengths(examples, rows)
        if lengths is None or len(rows) * int(lengths.max(0).values.sum()) <= max_tokens:
            return [rows]
        order = lengths.sum(1).argsort(stable=True)  # similar lengths together: less padding
        return list(rows[order].split(batch_sizes(lengths[order], max_tokens)))

    def loss_terms(self, batch: Batch) -> int:
        """Return the number of terms that ``loss`` is the mean of; by default one a row."""
        return len(batch["labels"])

    def relabel(self, batch: Batch, order: Tensor) -> Batch:
        """Return the batch with label ``order[y]`` instead of ``y``."""
        return {**batch, "labels": order[batch["labels"]]}

    @property
    def token_task(self) -> Any:
        """The ``TokenTask`` of the loss's forward passes; None if they predict no tokens."""
        return None

    def forward_batches(self, batch: Batch) -> list[Batch]:
        """Return the batches of the loss's forward passes: by default this one."""
        return [batch]

    def reference(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Return the pretrained network's values for some rows (b, ...); only if ``needs_reference``.

        They are computed once, without adapters, and ``collate`` finds them in ``Examples.reference``.
        """
        raise AssertionError("this task has no reference")

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a differentiable scalar in float32 in every precision."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return each row's loss (b,), independent of the other rows."""

    def outputs(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the network's outputs for scoring, one entry a row: by default its logits."""
        return compute_logits(network, batch)

    def evaluate(self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device) -> Tensor:
        """Return the input of ``scores`` for some rows: a fixed number of values a row."""
        return self.outputs(network, move_batch(self.collate(examples, rows), device))

    def score_rows(
        self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device, batch_size: int,
        order: Tensor | None = None,
    ) -> Scores:  # fmt: skip
        """Return the scores of some rows, with the labels ``order[y]``; only if ``scores_rows``.

        For a task whose scores are no function of fixed outputs of each row.
        """
        raise AssertionError("this task scores outputs")

    @abstractmethod
    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return sums over rows of what ``evaluate`` returned; ``metric`` is computed from them."""

    @abstractmethod
    def probe(self, network: nn.Module) -> Batch:
        """Return a small fixed batch without labels, to compare two networks."""

    @abstractmethod
    def preprocessor(self, model: str) -> Any:
        """Return the tokenizer or image processor to save beside the network; None if the model has none."""


@dataclass(frozen=True)
class TableTask(Task):
    """The keys of the ``[task]`` table about the data, for tasks that read rows from files or hubs."""

    data: PerMachine[str]  # a hub id, a folder, a file; for images also "digits" (embedded)
    data_config: PerMachine[str | None] = None  # of a hub id that has several
    encoding: PerMachine[str | None] = None  # of CSV and JSON files; None: detected, else UTF-8
    delimiter: PerMachine[str | None] = None  # of CSV files; None: detected from the header
    train_split: PerMachine[str] = "train"
    test_split: PerMachine[str] = "test"
    train_rows: int | None = None  # number of rows, drawn from the seed; None: all
    test_rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        text_format(self)

    @property
    def test_splits(self) -> tuple[str, ...]:
        """The test splits: one, or several that are scored separately."""
        return (self.test_split,)

    def load_splits(self, seed: int) -> Splits:
        """Return the training split and the test splits with all rows."""
        return load_splits(self.data, self.data_config, self.train_split, self.test_splits, seed, text_format(self))

    def draw_splits(self, splits: Splits, seed: int, label: str = "", classes: Classes | None = None) -> list[Any]:
        """Return splits reduced to ``train_rows`` and ``test_rows``, and to the labels that ``classes`` keep."""
        limits = [(self.train_rows, "training"), *[(self.test_rows, "test")] * (len(splits) - 1)]
        return [
            draw_rows(split, rows, None if classes is None else classes.values(split, label), label, seed, role)
            for split, (rows, role) in zip(splits, limits)
        ]


class Classification(Task):
    """Loss and scores of text and image classification."""

    metrics = ("accuracy", "f1", "matthews", "macro_f1")
    label_names: list[str] | None
    labels: list[int | str] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.label_names)
        if self.label_names and len(self.label_names) < 2:
            raise ValueError("task.label_names has only 1 label; a classification needs at least 2.")
        if (labels := self.known_labels()) is not None:  # raises if task.labels has an unknown name
            self.check_labels(len(labels))

    def known_labels(self) -> tuple[str, ...] | None:
        return Classes(self.all_labels(), True).keep(self.labels).outputs if self.label_names else None

    def all_labels(self) -> tuple[str, ...]:
        return tuple(self.label_names or ())

    def check_labels(self, labels: int) -> None:
        if self.metric in ("f1", "matthews") and labels != 2:
            raise ValueError(
                f"task.metric is {self.metric!r}, which needs two labels; there are {labels}: take 'macro_f1' or "
                "'accuracy'."
            )

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.outputs(network, batch).float(), batch["labels"])

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.outputs(network, batch).float(), batch["labels"], reduction="none")

    def scores(self, outputs: Tensor, labels: Tensor) -> Scores:
        """Return the sums for accuracy and cross-entropy, and the confusion counts if the metric needs them."""
        predicted, rows = outputs.argmax(-1), len(labels)
        loss = float(functional.cross_entropy(outputs.double(), labels, reduction="sum"))
        sums = {"accuracy": (int((predicted == labels).sum()), rows), "loss": (loss, rows)}
        if self.metric == "macro_f1":
            for label in range(outputs.shape[-1]):
                counts = confusion_counts(predicted == label, labels == label)
                sums |= {f"{name}.{label}": total for name, total in counts.items()}
        elif self.metric != "accuracy":
            self.check_labels(outputs.shape[-1])
            sums |= confusion_counts(predicted == 1, labels == 1)
        return Scores(sums)


def move_batch(batch: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """Return a batch with all tensors on the device: a tensor, a mapping, a tuple or list, or an object with ``to``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=non_blocking)
    if isinstance(batch, Mapping):  # also a BatchEncoding, whose own ``to`` moves only tensors at its top
        return {name: move_batch(x, device, non_blocking) for name, x in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_batch(x, device, non_blocking) for x in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move_batch(x, device, non_blocking) for x in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def pin_batch(batch: Any) -> Any:
    """Return a batch whose tensors are in pinned memory, from which CUDA copies while Python goes on."""
    return tree_map_only(Tensor, Tensor.pin_memory, batch)


def confusion_counts(predicted: Tensor, actual: Tensor) -> dict[str, tuple[int, int]]:
    """Return the true positives, false positives and false negatives of one label, each with the number of rows."""
    table = {"tp": predicted & actual, "fp": predicted & ~actual, "fn": ~predicted & actual}
    return {name: (int(hits.sum()), len(hits)) for name, hits in table.items()}


def compute_logits(network: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a batch without its labels, rows by outputs."""
    return network(**{name: x for name, x in batch.items() if name != "labels"}).logits


def lengths_of_one(rows: int) -> Tensor:
    """Return ``Examples.lengths`` of rows that have no length."""
    return torch.ones(rows, dtype=torch.int64)
