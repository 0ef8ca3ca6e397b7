"""Evaluation, by one path for all methods: receive, load, score."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.tasks._base import Examples, Shard, Task
from fedlora.tasks.metrics.scores import KNOWN, Scores, figures, pooled
from fedlora.training.model import Model
from fedlora.types import Tree


@dataclass(frozen=True)
class Evaluation:
    """The ``[evaluation]`` table."""

    every: int = 1  # rounds between evaluations; the last round is always evaluated
    batch_size: int = 256
    measure: bool = True  # aggregation errors, weight by weight

    def __post_init__(self):
        for key in ("every", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"evaluation.{key} is {getattr(self, key)}; it must be at least 1.")

    def due(self, round: int, rounds: int) -> bool:
        """Whether round number ``round`` (from 0) ends with an evaluation."""
        return (round + 1) % self.every == 0 or round + 1 == rounds


@dataclass
class Evaluator:
    """Scores trees on the test rows. Rows that a tree has been asked for before are not computed again.

    That makes nothing special of any method: where all clients hold the same leaves as the global model, a client's
    rows are among the global test rows, and its scores are a selection.
    """

    model: Model
    task: Task
    test: Examples
    shards: Mapping[int, Shard] | Sequence[Shard]
    batch_size: int = 256
    _tree: Tree | None = None
    _base_version: int = -1
    _outputs: Tensor | None = None
    _known: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def everyone(self, tree: Tree) -> Scores:
        """The tree on the global test rows, with the labels as they are."""
        return self.task.scores(self._on(tree, torch.arange(len(self.test))), self.test.labels)

    def client(self, number: int, tree: Tree) -> Scores:
        """The tree on one client's test rows, with that client's labels."""
        shard = self.shards[number]
        labels = self.test.labels[shard.test]
        labels = labels if shard.relabel is None else shard.relabel[labels]
        return self.task.scores(self._on(tree, shard.test), labels)

    @torch.no_grad()  # not inference mode: loading may make new parameters, which must be fit for training
    def _on(self, tree: Tree, rows: Tensor) -> Tensor:
        if self._tree is None or self._base_version != self.model.base_version or not _same(tree, self._tree):
            self._tree, self._base_version, self._outputs = tree, self.model.base_version, None
            self._known = torch.zeros(len(self.test), dtype=torch.bool)
        missing = rows[~self._known[rows]]
        if len(missing):
            self._compute(tree, missing)
        assert self._outputs is not None
        return self._outputs[rows]

    def _compute(self, tree: Tree, rows: Tensor) -> None:
        self.model.load(tree)
        self.model.network.eval()
        rows = rows[self.test.lengths[rows].argsort(stable=True)]  # like lengths together: less padding
        for some in rows.split(self.batch_size):
            with self.model.running():
                outputs = self.task.graded(self.model.network, self.test, some, self.model.device).float().cpu()
            if bool(outputs.isnan().any()):  # an accuracy would be read out of it all the same
                raise FloatingPointError(
                    "what the model says of test rows is no number (nan); lower training.learning_rate, or set "
                    "training.max_grad_norm."
                )
            if self._outputs is None:
                self._outputs = torch.zeros(len(self.test), *outputs.shape[1:])
            self._outputs[some] = outputs
        self._known[rows] = True


def _same(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(
        a[part].keys() == b[part].keys() and all(a[part][leaf] is b[part][leaf] for leaf in a[part]) for part in a
    )


def summary(
    scores: Mapping[int, Scores], metric: str, count: int, capabilities: Sequence[float] | None = None
) -> dict[str, Any]:
    """One metric over ``count`` clients: mean over clients, over all their rows, the worst client, the spread, each.

    A client without scores counts in none of them and is ``None`` in ``each``. ``figures`` has the mean over clients
    of every figure. Where clients differ in capability, ``capability`` has a group for each, the weakest first.
    """
    found = {client: figures(one) for client, one in scores.items()}
    own = {client: values[metric] for client, values in found.items()}
    every = figures(pooled(scores.values()))
    worst = (min if KNOWN[metric].higher else max)(own, key=own.__getitem__)
    unequal = capabilities is not None and len(set(capabilities)) > 1
    groups = {"capability": _groups(own, capabilities or (), KNOWN[metric].higher)} if unequal else {}
    return {
        "mean": statistics.fmean(own.values()),
        "examples_mean": every[metric],
        "worst": own[worst],
        "worst_client": worst,
        "spread": statistics.pstdev(own.values()),
        "figures": {name: statistics.fmean(values[name] for values in found.values()) for name in every},
        "each": [own.get(client) for client in range(count)],
        **groups,
    }


def _groups(own: Mapping[int, float], capabilities: Sequence[float], higher: bool) -> list[dict[str, Any]]:
    found = []
    for level in sorted(set(capabilities)):
        values = [value for client, value in own.items() if capabilities[client] == level]
        if values:
            worst = (min if higher else max)(values)
            found.append(
                {"capability": level, "clients": len(values), "mean": statistics.fmean(values), "worst": worst}
            )
    return found
