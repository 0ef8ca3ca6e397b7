"""What the batches of a run cost: the shapes that the seeds will draw, a few of them tried, the others in between."""

import statistics
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.engines.federation import Federation
from fedlora.runs.plan.footprint import Cost, interpolated
from fedlora.runs.plan.meta_model import MetaModel
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Examples
from fedlora.training.local import sample_batches

WATCHED = 20_000  # batches whose shapes are drawn beforehand; of a longer run, the first ones
POINTS = 3  # widths at which a batch is tried


@dataclass
class Shapes:
    """The batches that the seeds will draw: how many of each number of rows and width, and the rows of some."""

    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    rows: dict[int, Tensor] = field(default_factory=dict)  # width -> the largest batch of that width
    complete: bool = True
    turns: int = 0

    @classmethod
    def of(cls, f: Federation) -> "Shapes":
        """Of the whole run, or its first part."""
        found = cls()
        if f.data is None:
            return found
        for number in range(f.rounds):
            for client in f.clients.remaining(number, f.seed):
                if found.counts.total() >= WATCHED:
                    found.complete = False
                    return found
                found.add(f, number, client, f.data.train)
        return found

    def add(self, f: Federation, number: int, client: int, examples: Examples) -> None:
        """One client's turn."""
        rows, training, self.turns = f.shards[client].train, f.training_of(number, client), self.turns + 1
        stream = sample_batches(examples, rows, training, derive_seed(f.turn(number, client).seed, "batches"))
        for _ in range(training.steps(len(rows)) * training.accumulation_steps):
            some = next(stream)
            width = int(examples.lengths[some].max())
            self.counts[len(some), width] += 1
            if width not in self.rows or len(self.rows[width]) < len(some):
                self.rows[width] = some

    def tried(self) -> list[int]:
        """Widths worth trying: the largest batch's, and at most two others that are far from it."""
        if not self.rows:
            return []
        largest = max(self.rows, key=lambda width: (len(self.rows[width]) * width, width))
        widths = sorted(self.rows)
        return list(dict.fromkeys([largest, widths[0], widths[len(widths) // 2]]))[:POINTS]


@dataclass
class Measured:
    """What batches cost."""

    train: Cost
    score: Cost
    each: float  # FLOPs of a client's turn, mean
    evaluating: float  # FLOPs of a client's evaluation on its own rows, mean

    def flops(self, f: Federation) -> dict[str, float]:
        """Per client and round, and of the run; evaluation where it is due."""
        due = sum(f.evaluation.is_due(number, f.rounds) for number in range(f.rounds))
        turns = sum(len(f.clients.remaining(number, f.seed)) for number in range(f.rounds))
        run = self.each * turns + self.evaluating * due * f.clients.members
        return {"training": self.each, "evaluation": self.evaluating, "run": run}


def measured(o: MetaModel, shapes: Shapes) -> Measured:
    """The dearest batch of training and of evaluation, and what a client's turn takes on average."""
    f, bench = o.federation, o.bench
    trained = _trained(o)
    if f.data is None:
        batch = _stand_in(o)
        cost = max((bench.train(batch, leaves) for leaves in trained), key=lambda c: c.peak)
        score = bench.score(batch)
        steps = f.training.steps(1) * f.training.accumulation_steps
        return Measured(cost, score, float(cost.flops * steps), 0.0)
    points: dict[int, float] = {}
    most = Cost(0, 0, 0)
    for width in shapes.tried():
        batch = o.config.task.collate(f.data.train, shapes.rows[width])
        costs = [bench.train(batch, leaves) for leaves in trained]
        points[width] = statistics.fmean(cost.flops for cost in costs) / len(shapes.rows[width])
        most = max(most, *costs, key=lambda cost: cost.peak)
    at = interpolated(points)
    total = sum(many * rows * at(width) for (rows, width), many in shapes.counts.items())
    score, evaluating = _scored(o)
    return Measured(most, score, total / shapes.turns, evaluating)


def _scored(o: MetaModel) -> tuple[Cost, float]:
    """The widest batch of an evaluation, and what a client's evaluation takes on average."""
    f = o.federation
    assert f.data is not None
    test, size = f.data.test, f.evaluation.batch_size
    ordered = torch.arange(len(test))[test.lengths.argsort(stable=True)]
    some = [ordered.split(size)[i] for i in {0, len(ordered.split(size)) // 2, len(ordered.split(size)) - 1}]
    costs = [
        (int(test.lengths[rows].max()), len(rows), o.bench.score(o.config.task.collate(test, rows))) for rows in some
    ]
    at = interpolated({width: cost.flops / rows for width, rows, cost in costs})
    own = []
    for client in range(f.clients.members):
        rows = f.shards[client].test
        parts = rows[test.lengths[rows].argsort(stable=True)].split(size) if len(rows) else ()
        own.append(sum(len(part) * at(int(test.lengths[part].max())) for part in parts))
    return max((cost for _, _, cost in costs), key=lambda cost: cost.peak), statistics.fmean(own)


def _trained(o: MetaModel) -> list[dict[str, frozenset[str]]]:
    """What a client with all resources trains in the first two rounds, once where that is the same."""
    f, found = o.federation, []
    first = f.budgets.index(max(f.budgets))
    for number in range(min(2, f.rounds)):
        turn = f.turn(number, first)
        known: dict[str, frozenset[str]] = {}
        for group in o.groups:
            rule, layer = f.rules[group.part], group.layer
            known[group.part] = rule.trains(layer, turn, lambda layer=layer: layer)
        found.append({path: known[_standing(o, path)] for path in f.model.parts})
    return [found[0]] if found[0] == found[-1] else found


def _standing(o: MetaModel, path: str) -> str:
    return next(group.part for group in o.groups if group.layer is o.bench.tree[path])


def _stand_in(o: MetaModel) -> dict[str, Tensor]:
    """A batch of rows that nobody here has seen, each as long as the task lets it be."""
    probe = o.config.task.probe(o.federation.model.network)
    rows, width = o.federation.training.batch_size, getattr(o.config.task, "max_length", None)
    shapes = {
        name: torch.empty((rows, *((width,) if x.ndim == 2 and width else x.shape[1:])), dtype=x.dtype, device="meta")
        for name, x in probe.items()
    }
    return {**shapes, "labels": torch.empty(rows, dtype=torch.int64, device="meta")}
