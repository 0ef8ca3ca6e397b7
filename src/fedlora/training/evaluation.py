"""Evaluation of trees on test rows, the same for all methods."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora.tasks._base import Examples, Shard, Task
from fedlora.tasks.data.token_budget import batch_sizes
from fedlora.tasks.metrics.scores import Scores, compute_metrics, is_higher_better, pool
from fedlora.training.model import Model
from fedlora.training.token_budget import default_tokens
from fedlora.types import Tree


@dataclass(frozen=True)
class Evaluation:
    """The ``[evaluation]`` table."""

    every: int = 1  # rounds between evaluations; the last round is always evaluated
    batch_size: int = 256  # rows at a time, at most
    # Tokens at a time, at most, padding included, if rows have tokens; a longer row is evaluated alone. None: by the
    # memory of the machine and the size of the model.
    max_tokens: int | None = None
    measure: bool = True  # aggregation errors, weight by weight

    def __post_init__(self) -> None:
        for key in ("every", "batch_size", "max_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{key} is {value}; it must be at least 1.")

    def is_due(self, round: int, rounds: int) -> bool:
        """Whether round number ``round`` (from 0) ends with an evaluation."""
        return (round + 1) % self.every == 0 or round + 1 == rounds

    def split(self, task: Task, examples: Examples, rows: Tensor, model: Model) -> list[Tensor]:
        """Return rows in batches, of similar lengths, within ``batch_size`` rows and ``max_tokens`` tokens."""
        rows = rows[examples.lengths[rows].argsort(stable=True)]  # less padding
        lengths = task.padded_lengths(examples, rows)
        if lengths is None:
            return list(rows.split(self.batch_size))
        tokens = self.max_tokens or default_tokens(model.network, model.device)
        return list(rows.split(batch_sizes(lengths, tokens, self.batch_size)))


class Scorer(Protocol):
    """The interface of an evaluator: it scores trees, which it may compare by identity with the last one."""

    def score_all(self, tree: Tree) -> Scores: ...
    def score_client(self, number: int, tree: Tree) -> Scores: ...


@dataclass
class Evaluator:
    """Scores trees on the test rows.

    The outputs, or the scores, of the last tree are kept for clients that hold the same leaves.
    """

    model: Model
    task: Task
    test: Examples
    shards: Mapping[int, Shard] | Sequence[Shard]
    settings: Evaluation = Evaluation()
    _tree: Tree | None = None
    _base_version: int = -1
    _outputs: Tensor | None = None
    _known: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _scores: dict[tuple[bytes, bytes], Scores] = field(default_factory=dict)  # by rows and order of labels

    def score_all(self, tree: Tree) -> Scores:
        """Return the scores of a tree on the global test rows, with the original labels."""
        if self.task.scores_rows:
            return self._score(tree, torch.arange(len(self.test)), None)
        return self.task.scores(self._evaluate(tree, torch.arange(len(self.test))), self.test.labels)

    def score_client(self, number: int, tree: Tree) -> Scores:
        """Return the scores of a tree on one client's test rows, with that client's labels."""
        shard = self.shards[number]
        if self.task.scores_rows:
            return self._score(tree, shard.test, shard.relabel)
        labels = self.test.labels[shard.test]
        labels = labels if shard.relabel is None else shard.relabel[labels]
        return self.task.scores(self._evaluate(tree, shard.test), labels)

    @torch.no_grad()  # not inference mode: loading may create parameters, which must be trainable later
    def _evaluate(self, tree: Tree, rows: Tensor) -> Tensor:
        """Return the outputs of some rows, computing only those that are not kept."""
        self._forget_other_trees(tree)
        missing = rows[~self._known[rows]]
        if len(missing):
            self._compute(tree, missing)
        assert self._outputs is not None
        return self._outputs[rows]

    @torch.no_grad()
    def _score(self, tree: Tree, rows: Tensor, order: Tensor | None) -> Scores:
        """Return the scores of some rows, from a task that scores rows itself."""
        self._forget_other_trees(tree)
        key = (rows.numpy().tobytes(), b"" if order is None else order.numpy().tobytes())
        if key not in self._scores:
            self.model.load(tree)
            self.model.network.eval()
            with self.model.running():
                self._scores[key] = self.task.score_rows(
                    self.model.network, self.test, rows, self.model.device, self.settings.batch_size, order
                )
        return self._scores[key]

    def _forget_other_trees(self, tree: Tree) -> None:
        if self._tree is None or self._base_version != self.model.base_version or not is_same_tree(tree, self._tree):
            self._tree, self._base_version, self._outputs, self._scores = tree, self.model.base_version, None, {}
            self._known = torch.zeros(len(self.test), dtype=torch.bool)

    def _compute(self, tree: Tree, rows: Tensor) -> None:
        self.model.load(tree)
        self.model.network.eval()
        batches = self.settings.split(self.task, self.test, rows, self.model)
        values = []  # on the device until the end, so that no batch waits for the one before
        for batch in batches:
            with self.model.running():
                values.append(self.task.evaluate(self.model.network, self.test, batch, self.model.device).float())
        outputs = torch.cat(values).cpu()
        if bool(outputs.isnan().any()):  # an accuracy could be computed from it
            raise FloatingPointError(
                "the model's outputs for test rows are not numbers (nan); lower training.learning_rate, or set "
                "training.max_grad_norm."
            )
        if self._outputs is None:
            self._outputs = torch.zeros(len(self.test), *outputs.shape[1:])
        self._outputs[torch.cat(batches)] = outputs
        self._known[rows] = True


def is_same_tree(a: Tree, b: Tree) -> bool:
    """Whether two trees hold the same objects."""
    return a.keys() == b.keys() and all(
        a[part].keys() == b[part].keys() and all(a[part][leaf] is b[part][leaf] for leaf in a[part]) for part in a
    )


def summarize(
    scores: Mapping[int, Scores], metric: str, count: int, capabilities: Sequence[float] | None = None,
    higher: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return a metric over ``count`` clients: the mean over clients and over rows, the worst, the spread, and each.

    A client without scores does not count, and is ``None`` in ``each``. ``figures`` has the mean over clients of every
    metric. If capabilities differ, ``capability`` has one group for each, the weakest first. ``higher`` says whether a
    higher value is better (None: as the metric's name says).
    """
    metrics = {client: compute_metrics(sums) for client, sums in scores.items()}
    for client, every in metrics.items():
        if metric not in every:
            names = ", ".join(sorted(every)) or "none"
            raise ValueError(
                f"the metric is {metric!r}, and the scores of client {client} are {names}; set metric to one of these."
            )
    values = {client: every[metric] for client, every in metrics.items()}
    higher = is_higher_better(metric) if higher is None else higher
    pooled, worst_of = compute_metrics(pool(scores.values())), min if higher else max
    worst = worst_of(values, key=values.__getitem__)
    summary = {
        "mean": statistics.fmean(values.values()),
        "examples_mean": pooled[metric],
        "worst": values[worst],
        "worst_client": worst,
        "spread": statistics.pstdev(values.values()),
        "figures": {
            name: statistics.fmean(every[name] for every in metrics.values())
            for name in pooled
            if all(name in every for every in metrics.values())
        },
        "each": [values.get(client) for client in range(count)],
    }
    if capabilities is not None and len(set(capabilities)) > 1:
        levels = {level: [x for k, x in values.items() if capabilities[k] == level] for level in set(capabilities)}
        summary["capability"] = [
            {"capability": level, "clients": len(group), "mean": statistics.fmean(group), "worst": worst_of(group)}
            for level, group in sorted(levels.items())
            if group
        ]
    return summary
