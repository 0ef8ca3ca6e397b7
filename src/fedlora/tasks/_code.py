"""The caller's Python objects, used instead of a model's name and data files."""

import math
import numbers
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.seeds import derive_seed
from fedlora.tasks._base import Data, Examples, lengths_of_one, move_batch
from fedlora.tasks.data.datasets import CLASSES, Rows, check_dataset, is_one_each, read_rows, read_values
from fedlora.tasks.metrics.scores import Scores, is_possible

ROW, DIGEST = "row", "digest"  # features: a row's number, over training and test rows, and a digest of its content
PROBED = 4  # rows that two networks are compared on


class Code(ABC):
    """The objects of an ``objects`` task: the model, the rows, the loss and the scores."""

    @abstractmethod
    def load(self, seed: int, client_column: str | None) -> Data:
        """Return both splits: rows by number, with labels for partitions. The same rows at every call.

        For ``client_column = "client"``, ``Examples.groups`` has the number of each row's client, as a text.
        """

    @abstractmethod
    def network(self, seed: int) -> nn.Module:
        """Return a new network, with the same weights at every call."""

    @abstractmethod
    def collate(self, examples: Examples, rows: Tensor) -> Any:
        """Return a batch of rows, of any type that ``move_batch`` moves."""

    def relabel(self, batch: Any, order: Tensor) -> Any:
        """Return the batch with label ``order[y]`` instead of ``y``. Raises ``ValueError`` if it has no ``labels``."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            raise ValueError(
                "clients.permute_labels is set, but a batch has no key 'labels' with a tensor; leave it out, or give a "
                "collate that returns one."
            )
        return {**batch, "labels": order[labels]}

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar in float32."""

    @property
    def losses_obstacle(self) -> str | None:
        """The reason why ``losses`` cannot be computed; None if it can."""
        return "each row's loss is not known"

    def losses(self, network: nn.Module, batch: Any) -> Tensor:
        """Return each row's loss (b,), independent of the other rows."""
        raise ValueError(f"{self.losses_obstacle}.")

    @abstractmethod
    def score_rows(
        self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device, batch_size: int,
        order: Tensor | None = None,
    ) -> Scores:  # fmt: skip
        """Return the sums of every metric over some rows."""

    @abstractmethod
    def probe(self) -> Any:
        """Return a small fixed batch on the CPU, to compare two networks."""


Metric = Callable[[nn.Module, Any], Any]  # (model, batch) -> (sum, count)


@dataclass
class OwnObjects(Code):
    """A model, datasets, a loss and metrics, as ``fedlora.run`` takes them.

    Args:
        model: a module, which is copied, or a function that returns a new one each time.
        train: one dataset, or a list with one for each client.
        test: the same; a list only if ``train`` is one.
        loss: ``loss(model, batch)``, a scalar; None: ``model(**batch).loss``.
        losses: ``losses(model, batch)``, each row's loss (b,), for example-level privacy.
        metrics: name -> ``metric(model, batch)``, which returns a sum and a count; empty: the loss.
        collate: a function from a list of rows to a batch; None: torch's ``default_collate``.
    """

    model: nn.Module | Callable[[], nn.Module]
    train: Any
    test: Any
    loss_function: Callable[[nn.Module, Any], Tensor] | None = None
    losses_function: Callable[[nn.Module, Any], Tensor] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    collate_function: Callable[[list[Any]], Any] | None = None
    _rows: dict[int, Rows] = field(default_factory=dict, init=False, repr=False)  # by place
    _last: Any = field(default=None, init=False, repr=False)  # a reference to the last network of a function

    def __post_init__(self) -> None:
        for key in ("train", "test"):
            value = getattr(self, key)
            names = [f"{key}[{k}]" for k in range(len(value))] if is_one_each(value) else [key]
            for name, dataset in zip(names, self._sets(key)):
                check_dataset(dataset, name)
        if is_one_each(self.test) and self.clients != len(self.test):
            sets = f"one of {self.clients}" if self.clients else "one dataset for all clients"
            raise ValueError(
                f"test is a list of {len(self.test)} datasets, and train is {sets}; give a test set for each client "
                "in the same order, or one for all."
            )

    @property
    def clients(self) -> int | None:
        """The number of clients, if each has a dataset of its own; else None."""
        return len(self.train) if is_one_each(self.train) else None

    def _sets(self, key: str) -> list[Any]:
        value = getattr(self, key)
        return list(value) if is_one_each(value) else [value]

    @property
    def _datasets(self) -> list[Any]:
        return [*self._sets("train"), *self._sets("test")]

    def load(self, seed: int, client_column: str | None) -> Data:
        parts = [self._read(place, dataset) for place, dataset in enumerate(self._datasets)]
        middle = len(self._sets("train"))
        labels, names = _number_labels(parts)
        start, splits = 0, []
        for key, own in (("train", parts[:middle]), ("test", parts[middle:])):
            size = sum(part.count for part in own)
            features = {ROW: torch.arange(start, start + size)}
            if all(part.digests is not None for part in own):
                features[DIGEST] = torch.cat([part.digests for part in own if part.digests is not None])
            y = labels[start : start + size]
            groups = self._groups(key, client_column)
            shown = y if names else torch.zeros_like(y)
            splits.append(Examples(features, shown, lengths_of_one(size), groups, None if names else y))
            start += size
        reasons = dict.fromkeys(reason for part in parts for reason in part.reasons)
        notes = [f"some rows have {reason}; resuming cannot tell whether these have changed." for reason in reasons]
        return Data(splits[0], splits[1], names, tuple(notes))

    def _read(self, place: int, dataset: Any) -> Rows:
        if place not in self._rows:
            with torch.random.fork_rng([]):  # random transforms do not change the caller's generator
                self._rows[place] = read_rows(dataset)
        return self._rows[place]

    def _groups(self, key: str, column: str | None) -> tuple[str, ...] | None:
        """Return each row's client, or its value of the column; None without a column."""
        value, sets = getattr(self, key), self._sets(key)
        if column is None or (self.clients is not None and not is_one_each(value)):
            return None
        if self.clients is not None:
            return tuple(str(client) for client, dataset in enumerate(sets) for _ in range(len(dataset)))
        return tuple(read_values(sets[0], column, key))

    def network(self, seed: int) -> nn.Module:
        if isinstance(self.model, nn.Module):
            try:
                return deepcopy(self.model)
            except (TypeError, RuntimeError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"model cannot be copied ({error}); give a function that returns a new one each time."
                ) from error
        with torch.random.fork_rng([]):  # new weights come from the run's seed
            torch.manual_seed(derive_seed(seed, "model"))
            network = self.model()
        if not isinstance(network, nn.Module):
            raise ValueError(f"model() returned a {type(network).__name__}; it should return an nn.Module.")
        if self._last is not None and self._last() is network:
            raise ValueError(
                "model() returned the same network twice, and that has adapters by now; return a new one each time, or "
                "give the network itself, which is copied."
            )
        self._last = weakref.ref(network)
        return network

    def collate(self, examples: Examples, rows: Tensor) -> Any:
        values = [self._row(number) for number in examples.features[ROW][rows].tolist()]
        return (self.collate_function or collate_rows)(values)

    def _row(self, number: int) -> Any:
        for dataset in self._datasets:
            if number < len(dataset):
                return dataset[number]
            number -= len(dataset)
        raise IndexError(number)

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        value = self._compute_loss(network, batch)
        if not isinstance(value, Tensor) or value.dim():
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss returned {kind}; it should return the mean loss of the batch, a scalar tensor.")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(
                "loss returned a value without a gradient, so nothing would be trained; compute it with the model that "
                "loss is called with, with gradients on, and adapt a layer that it goes through."
            )
        return value.float()

    def _compute_loss(self, network: nn.Module, batch: Any) -> Any:
        if self.loss_function is not None:
            return self.loss_function(network, batch)
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"without a loss, model(**batch).loss is computed, and a batch is a {type(batch).__name__}; give "
                "loss = a function of (model, batch), or rows that are mappings."
            )
        output = network(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"without a loss, model(**batch).loss is computed, and the model returned a {type(output).__name__} "
                "without one; give loss = a function of (model, batch), or rows with labels."
            )
        return loss

    @property
    def losses_obstacle(self) -> str | None:
        if self.losses_function is not None:
            return None
        return "each row's loss is needed, and loss returns their mean; give losses = a function of (model, batch) too"

    def losses(self, network: nn.Module, batch: Any) -> Tensor:
        if self.losses_function is None:
            return super().losses(network, batch)
        value, rows = self.losses_function(network, batch), count_rows(batch)
        if not isinstance(value, Tensor) or value.dim() != 1 or rows not in (None, len(value)):
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"losses returned {kind} for {rows} rows; it should return each row's loss, (b,).")
        return value.float()

    def score_rows(
        self, network: nn.Module, examples: Examples, rows: Tensor, device: torch.device, batch_size: int,
        order: Tensor | None = None,
    ) -> Scores:  # fmt: skip
        metrics: Mapping[str, Metric | None] = self.metrics or {"loss": None}
        sums = dict.fromkeys(metrics, (0.0, 0))
        for part in rows.split(batch_size):
            batch = self.collate(examples, part)
            batch = move_batch(batch if order is None else self.relabel(batch, order), device)
            for name, metric in metrics.items():
                pair = (self.loss(network, batch) * len(part), len(part)) if metric is None else metric(network, batch)
                total, count = check_sum(name, pair)
                sums[name] = (sums[name][0] + total, sums[name][1] + count)
        for name, (total, count) in sums.items():
            if not count:
                raise ValueError(f"the metric {name!r} counted nothing in {len(rows)} test rows; a count is needed.")
            if not is_possible(name, total, count):
                raise ValueError(
                    f"the metric {name!r} has a sum of {total} over {count}; of this name it lies between 0 and the "
                    "count: return the sum of what the count counts, or give the metric another name."
                )
        return Scores(sums)

    def probe(self) -> Any:
        dataset = self._sets("test")[0]
        rows = [dataset[number] for number in range(min(PROBED, len(dataset)))]
        return (self.collate_function or collate_rows)(rows)


def _number_labels(parts: Sequence[Rows]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the labels of all rows, and their names; without names, labels only tell rows apart, or are all 0."""
    if any(part.labels is None for part in parts):
        return torch.zeros(sum(part.count for part in parts), dtype=torch.int64), ()
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    values, places = labels.unique(return_inverse=True)
    if len(values) > CLASSES:
        return torch.zeros_like(labels), ()
    if int(values[0]) < 0 or int(values[-1]) >= CLASSES:
        return places, ()
    names = max((part.names for part in parts), key=len)
    count = int(values[-1]) + 1
    return labels, names if len(names) >= count else tuple(map(str, range(count)))


def check_sum(name: str, pair: Any) -> tuple[float, int]:
    """Return a metric's sum and count. Raises ``ValueError`` if they are of another form.

    Raises ``FloatingPointError`` if the sum is nan or infinite.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        kind = f"{len(pair)} values" if isinstance(pair, tuple | list) else f"a {type(pair).__name__}"
        raise ValueError(
            f"the metric {name!r} returned {kind}; it should return a sum over the batch and its count, such as "
            "(correct, rows)."
        )
    total, count = map(_to_number, pair)
    if not isinstance(total, numbers.Real) or not isinstance(count, numbers.Real) or not _is_count(float(count)):
        raise ValueError(
            f"the metric {name!r} returned the sum {total!r} and the count {count!r}; they should be a number, and a "
            "whole number of at least 0."
        )
    if not math.isfinite(total):
        raise FloatingPointError(
            f"the sum of the metric {name!r} is {float(total)} on test rows; lower training.learning_rate, or set "
            "training.max_grad_norm, or correct the metric."
        )
    return float(total), int(float(count))


def _to_number(value: Any) -> Any:
    """Return the number in a tensor or an array of one value."""
    size = value.numel() if isinstance(value, Tensor) else getattr(value, "size", 0)
    return value.item() if size == 1 and hasattr(value, "item") else value


def _is_count(value: float) -> bool:
    return math.isfinite(value) and value >= 0 and value.is_integer()


def collate_rows(rows: list[Any]) -> Any:
    """Return the batch of some rows: torch's ``default_collate``, with lists of numbers in rows that are mappings.

    Raises ``ValueError`` if they do not fit together.
    """
    if isinstance(rows[0], Mapping):  # a Hugging Face dataset has lists where torch's has tensors
        rows = [{name: _to_tensor(x) if isinstance(x, list) else x for name, x in row.items()} for row in rows]
    try:
        return torch.utils.data.default_collate(rows)
    except (TypeError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"these rows cannot be put into one batch ({str(error).splitlines()[0]}); give collate = a function from a "
            "list of rows to a batch."
        ) from error


def _to_tensor(value: list[Any]) -> Any:
    try:
        return torch.tensor(value)
    except (TypeError, ValueError):
        return value


def count_rows(batch: Any) -> int | None:
    """Return the length of the first tensor in a batch; None if it has none."""
    return next((len(x) for x in _tensors(batch) if x.dim()), None)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
