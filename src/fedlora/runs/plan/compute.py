"""Computation and memory of a run's batches, measured on fake tensors.

The shapes of the batches follow from the seeds. A few of them are tried, and the others are interpolated.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedlora.engines.federation import Federation
from fedlora.runs.plan.memory import MemoryTracker
from fedlora.runs.plan.meta_model import MetaModel
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Batch
from fedlora.tasks.networks.next_token_loss import assume_chunks, loss_of, select_learnt
from fedlora.training.local import sample_batches

MAX_BATCHES = 20_000  # batches whose shapes are drawn; of a longer run, the first ones
POINTS = 3  # widths that are tried
CPU_ATTENTION = {  # torch counts these on a GPU only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **_: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **_: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class BatchCost:
    """Floating point operations and bytes of one batch."""

    flops: int
    saved: int  # activations for the backward pass
    peak: int  # at most at a time, beside the weights and leaves: with gradients and moments
    gradients: int = 0
    moments: int = 0


class Bench:
    """Runs batches of any shape on a meta model with fake tensors."""

    def __init__(self, meta: MetaModel):
        f = meta.federation
        self.model, self.task, self.training, self.fake = f.model, f.task, f.training, meta.fake
        self.is_approximate = False  # whether a loss depends on values, and was taken at every position
        leaves: dict[int, Tensor] = {}
        with self.fake:
            for x in (x for layer in meta.tree.values() for x in layer.values()):  # a shared leaf stays one tensor
                leaves[id(x)] = leaves.get(id(x), torch.empty(x.shape, device=self.model.device))
        self.model.load({part: {k: leaves[id(x)] for k, x in layer.items()} for part, layer in meta.tree.items()})
        if self.task.token_task is not None:
            with self.fake:
                assume_chunks(self.model.network, self._batch(self.task.probe(self.model.network)))
        self.known = [*self.model.network.parameters(), *self.model.network.buffers()]

    def train(self, shapes: Mapping[str, Tensor], trained: Mapping[str, frozenset[str]]) -> BatchCost:
        """Measure one optimiser step, with the moments of earlier steps."""
        parameters = list(self.model.select(trained).values())
        if not parameters:
            return BatchCost(0, 0, 0)
        optimizer, learnt = self.training.build(parameters), self._count_learnt(shapes)
        self.model.network.train()
        with self.fake, MemoryTracker(self.known) as memory:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # allocates the moments
            if self.training.max_tokens is None and self.training.accumulation_steps == 1:
                optimizer.zero_grad(set_to_none=True)  # else a batch begins with the gradients of those before it
            memory.peak = before = memory.now
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                loss = self._loss(shapes, learnt)
                saved = memory.now - before
                loss.backward()
            del loss
            gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            if self.training.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            states = (x for state in optimizer.state.values() for x in state.values())
            moments = sum(x.nbytes for x in states if isinstance(x, Tensor))
            return BatchCost(counter.get_total_flops(), saved, memory.peak, gradients, moments)

    def score(self, shapes: Mapping[str, Tensor]) -> BatchCost:
        """Measure a forward pass for evaluation."""
        self.model.network.eval()
        learnt = self._count_learnt(shapes)
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with self.fake, torch.no_grad(), MemoryTracker(self.known) as memory, counter:
            batch = self._batch(shapes)
            with self.model.running():
                self._run(lambda: self.task.outputs(self.model.network, batch), batch, learnt)
        return BatchCost(counter.get_total_flops(), 0, memory.peak)

    def _loss(self, shapes: Mapping[str, Tensor], learnt: list[int]) -> Tensor:
        batch = self._batch(shapes)
        with self.model.running():
            return self._run(lambda: self.task.loss(self.model.network, batch), batch, learnt)

    def _batch(self, shapes: Mapping[str, Tensor]) -> Batch:
        return {name: torch.zeros(x.shape, dtype=x.dtype, device=self.model.device) for name, x in shapes.items()}

    def _run(self, compute: Callable[[], Tensor], batch: Batch, learnt: list[int]) -> Tensor:
        """Run the task's computation, or take the loss at ``learnt`` positions if its shapes depend on values."""
        try:
            return compute()
        except (DataDependentOutputException, DynamicOutputShapeException):
            parts = self.task.forward_batches(batch)
            if self.task.token_task is not None:
                return torch.stack([self._loss_at(*x) for x in zip(parts, learnt, strict=True)]).sum()
            self.is_approximate = True
            return torch.stack([self._loss_everywhere(part) for part in parts]).sum()

    def _loss_at(self, batch: Batch, learnt: int) -> Tensor:
        """Return the loss of the first ``learnt`` positions."""
        network: Any = self.model.network
        positions = torch.arange(learnt, device=self.model.device)
        inputs = self.task.token_task.inputs(network, batch)
        return loss_of(network).mean(network, inputs, positions, torch.zeros_like(positions))

    def _loss_everywhere(self, batch: Batch) -> Tensor:
        output: Any = self.model.network(**{name: x for name, x in batch.items() if name != "labels"})
        flat = output.logits.flatten(0, -2).float()
        return functional.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.int64, device=flat.device))

    def _count_learnt(self, batch: Mapping[str, Tensor]) -> list[int]:
        """Return the learnt tokens of each forward pass of a batch, all tokens if its rows are on other machines."""
        if self.task.token_task is None:
            return []
        parts = self.task.forward_batches(dict(batch))
        if parts[0]["labels"].is_meta:
            self.is_approximate = True
            return [part["labels"].numel() for part in parts]
        return [len(select_learnt(self.task.token_task.targets(part))[0]) for part in parts]


@dataclass
class Shapes:
    """The batches of a run, in parts within ``training.max_tokens``: how many have each number of rows and width.

    ``rows`` has the largest batch of each width.
    """

    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    rows: dict[int, Tensor] = field(default_factory=dict)  # width -> the largest batch of that width
    is_complete: bool = True
    turns: int = 0

    @classmethod
    def of(cls, f: Federation) -> "Shapes":
        """Draw the batches of the run, or of its first part."""
        shapes = cls()
        for number in range(f.rounds if f.data is not None else 0):
            for client in f.clients.remaining(number, f.seed):
                if shapes.counts.total() >= MAX_BATCHES:
                    shapes.is_complete = False
                    return shapes
                shapes._add_turn(f, number, client)
        return shapes

    def _add_turn(self, f: Federation, number: int, client: int) -> None:
        assert f.data is not None
        rows, training, self.turns = f.shards[client].train, f.training_of(number, client), self.turns + 1
        stream = sample_batches(f.data.train, rows, training, derive_seed(f.turn(number, client).seed, "batches"))
        for _ in range(training.steps(len(rows)) * training.accumulation_steps):
            batch = next(stream)
            limit = training.max_tokens
            for part in [batch] if limit is None else f.task.split_by_tokens(f.data.train, batch, limit):
                width = int(f.data.train.lengths[part].max())
                self.counts[len(part), width] += 1
                if width not in self.rows or len(self.rows[width]) < len(part):
                    self.rows[width] = part

    def widths(self) -> list[int]:
        """Return the widths to try: that of the largest batch, the smallest and the median."""
        if not self.rows:
            return []
        largest = max(self.rows, key=lambda width: (len(self.rows[width]) * width, width))
        widths = sorted(self.rows)
        return list(dict.fromkeys([largest, widths[0], widths[len(widths) // 2]]))[:POINTS]


@dataclass
class ComputeEstimate:
    """The most expensive batches, and the mean operations of a client."""

    train: BatchCost
    score: BatchCost
    turn_flops: float  # mean over turns
    evaluation_flops: float  # of a client's evaluation on its own rows, mean

    def flops(self, f: Federation) -> dict[str, float]:
        """Return the operations of a turn, of an evaluation and of the run."""
        evaluations = sum(f.evaluation.is_due(number, f.rounds) for number in range(f.rounds)) * f.clients.members
        turns = sum(len(f.clients.remaining(number, f.seed)) for number in range(f.rounds))
        run = self.turn_flops * turns + self.evaluation_flops * evaluations
        return {"training": self.turn_flops, "evaluation": self.evaluation_flops, "run": run}


def estimate_compute(meta: MetaModel, bench: Bench, shapes: Shapes) -> ComputeEstimate:
    """Measure the most expensive batches, and interpolate the operations of all others."""
    f, trained = meta.federation, _trained_leaves(meta)
    if f.data is None:
        batch = _batch_without_rows(meta)
        cost = max((bench.train(batch, leaves) for leaves in trained), key=lambda c: c.peak)
        steps = f.training.steps(1) * f.training.accumulation_steps
        return ComputeEstimate(cost, bench.score(batch), float(cost.flops * steps), 0.0)
    points: dict[int, float] = {}
    most = BatchCost(0, 0, 0)
    for width in shapes.widths():
        batch = meta.config.task.collate(f.data.train, shapes.rows[width])
        costs = [bench.train(batch, leaves) for leaves in trained]
        points[width] = statistics.fmean(cost.flops for cost in costs) / len(shapes.rows[width])
        most = max(most, *costs, key=lambda cost: cost.peak)
    row_flops = _interpolate(points)
    total = sum(count * rows * row_flops(width) for (rows, width), count in shapes.counts.items())
    return ComputeEstimate(most, *_estimate_evaluation(meta, bench, total / shapes.turns))


def _estimate_evaluation(meta: MetaModel, bench: Bench, turn_flops: float) -> tuple[BatchCost, float, float]:
    """Return the most expensive batch of an evaluation, ``turn_flops``, and the mean operations of a client."""
    f = meta.federation
    assert f.data is not None
    test, task = f.data.test, meta.config.task
    parts = f.evaluation.split(task, test, torch.arange(len(test)), f.model)
    largest = max(range(len(parts)), key=lambda i: len(parts[i]) * int(test.lengths[parts[i]].max()))
    tried = [parts[i] for i in {0, len(parts) // 2, largest, len(parts) - 1}]
    costs = [bench.score(task.collate(test, rows)) for rows in tried]
    row_flops = _interpolate(
        {int(test.lengths[rows].max()): cost.flops / len(rows) for rows, cost in zip(tried, costs)}
    )
    totals = []
    for client in range(f.clients.members):
        rows = f.shards[client].test
        ordered = f.evaluation.split(task, test, rows, f.model) if len(rows) else ()
        totals.append(sum(len(part) * row_flops(int(test.lengths[part].max())) for part in ordered))
    return max(costs, key=lambda cost: cost.peak), turn_flops, statistics.fmean(totals)


def _trained_leaves(meta: MetaModel) -> list[dict[str, frozenset[str]]]:
    """Return the leaves that a client with the full budget trains in the first two rounds, once if they are equal."""
    f, rounds = meta.federation, []
    for number in range(min(2, f.rounds)):
        turn = f.turn(number, f.budgets.index(max(f.budgets)))
        leaves = {}
        for group in meta.groups:
            leaves[id(group.layer)] = f.rules[group.part].trains(group.layer, turn, lambda group=group: group.layer)
        rounds.append({part: leaves[id(meta.tree[part])] for part in f.model.parts})
    return rounds[:1] if rounds[0] == rounds[-1] else rounds


def _batch_without_rows(meta: MetaModel) -> dict[str, Tensor]:
    """Return a batch of rows with the task's maximal length, for data on other machines."""
    probe = meta.config.task.probe(meta.federation.model.network)
    training, width = meta.federation.training, getattr(meta.config.task, "max_length", None)
    rows = training.batch_size
    if training.max_tokens is not None and width:
        rows = min(rows, max(1, training.max_tokens // width))
    shapes = {
        name: torch.empty((rows, *((width,) if x.ndim == 2 and width else x.shape[1:])), dtype=x.dtype, device="meta")
        for name, x in probe.items()
    }
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    if meta.config.task.token_task is not None:
        labels = torch.empty_like(shapes.get("decoder_input_ids", shapes["input_ids"]))
    return {**shapes, "labels": labels}


def _interpolate(points: Mapping[int, float]) -> Callable[[int], float]:
    """Return the polynomial through ``{width: figure}``; a transformer's cost of a row is quadratic in its width."""

    def evaluate(width: int) -> float:
        total = 0.0
        for point, figure in points.items():
            for other in points:
                figure *= (width - other) / (point - other) if other != point else 1.0
            total += figure
        return total

    return evaluate
