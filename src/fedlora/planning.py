"""What a run will take, before anything is spent: numbers, bytes, memory and operations, without the model's weights."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedlora.adapters import Dense
from fedlora.comparison import for_label
from fedlora.config import Config, ConfigError, Table, build
from fedlora.engines.loop import Federation
from fedlora.footprint import Bench, Cost, interpolated, weight_bytes
from fedlora.model import Model
from fedlora.optimizers import ServerOptimizer
from fedlora.outline import faked, outlined
from fedlora.rounds import Rules
from fedlora.runtime import checkpoint_activations
from fedlora.seeds import derived
from fedlora.tasks.task import Examples
from fedlora.traffic import Group, Traffic, grouped, traffic
from fedlora.training import batches
from fedlora.types import Tree

WATCHED = 20_000  # batches whose shapes are drawn beforehand; of a longer run, the first ones
POINTS = 3  # widths at which a batch is tried


@dataclass(frozen=True)
class Outline:
    """A federation whose network has no weights, and what stands for its parts."""

    config: Config
    federation: Federation
    groups: list[Group]
    fake: FakeTensorMode
    bench: Bench


def planned(table: Table, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A plan for each method, or for the table's own; a method that cannot be run so says why (``problem``).

    ``ConfigError`` where none can.
    """
    names = list(dict.fromkeys(labels)) or [None]
    found = [_plan_of(table, name) for name in names]
    bad = [plan["problem"] for plan in found if "problem" in plan]
    if len(bad) == len(found):
        raise ConfigError(bad[0])
    return found


def _plan_of(table: Table, label: str | None) -> dict[str, Any]:
    base = {key: value for key, value in table.items() if key != "compare"}
    name = label or table.get("method", {}).get("name", "fedit")
    try:
        return {"method": name, **plan(build(for_label(table, label) if label else base))}
    except ValueError as error:
        return {"method": name, "problem": str(error)}


def plan(config: Config) -> dict[str, Any]:
    """One run's plan, JSON-able. ``ValueError`` says what the run would stop at."""
    o = outline(config)
    crossing = traffic(o.federation, o.groups)
    shapes = Shapes.of(o.federation)
    measured = _measured(o, shapes)
    return {
        "title": config.method.title,
        "options": options(config, crossing),
        "numbers": _numbers(o),
        "rows": _rows(o.federation),
        "bytes": byte_plan(o, crossing),
        "memory": _memory(o, crossing, measured),
        "flops": measured.flops(o.federation),
        "estimates": _estimates(o, crossing, shapes),
    }


def outline(config: Config) -> Outline:
    """The federation of a configuration, with data but without weights."""
    device = config.engine.chosen()
    data, shards = config.rows(None, True)
    names = tuple(config.task.agreed() or ()) if data is None else data.label_names
    network = outlined(config.task, config.model.name, len(names))
    training = config.engine.resolved(config.training, network)
    if training.gradient_checkpointing:
        checkpoint_activations(network)
    model = config.attached(network, training.precision, "meta")  # type: ignore[arg-type]
    rules = model.rules(config.method, config.head_rule)
    groups = grouped(model, rules)
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    f = Federation(
        rules, config.method, model, config.task, data, config.clients, _Known(shards), budgets, training,
        config.evaluation, config.server, config.rounds, config.seed, names,
    )  # fmt: skip
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tree = whole(model, groups, rules)
    faked(network, fake, device)
    model.device = device
    return Outline(config, f, groups, fake, Bench(model, config.task, training, fake, tree))


class _Known(dict[int, Any]):
    """Every client's rows; a client whose rows lie elsewhere has one, so that it has a weight."""

    def __init__(self, shards: Mapping[int, Any] | Sequence[Any]):
        super().__init__(shards if isinstance(shards, Mapping) else enumerate(shards))

    def __missing__(self, client: int) -> Any:
        from fedlora.clients import Shard

        return Shard(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def whole(model: Model, groups: Sequence[Group], rules: Rules) -> Tree:
    """Every part's leaves, by shape: those of the part that stands for it."""
    from fedlora.traffic import likeness

    layers = {likeness(model, rules, group.part): group.layer for group in groups}
    return {path: layers[likeness(model, rules, path)] for path in model.parts}


def options(config: Config, crossing: Traffic) -> dict[str, Any]:
    """What the method can do, and what these settings ask of it."""
    method, folds = config.method, crossing.folds > 0
    try:
        ServerOptimizer("momentum").check(method)
        averages = True
    except ValueError:
        averages = False
    return {
        "exact": bool(method.exact),
        "any_rank": method.any_rank,
        "secure_aggregation": method.sums,
        "server_optimizer": averages,
        "quantised_base": "folds are kept beside it" if folds else "yes",
        "partial_participation": "who was absent is sent the folds it missed" if folds else "yes",
        "result": "a model for each client" if method.personal else "one model for all",
        "head": "shared" if method.shares_head else "each client's own",
        "weighting": method.weighting,
    }


def _numbers(o: Outline) -> dict[str, Any]:
    model, f = o.federation.model, o.federation
    sums = {"adapter": 0, "head": 0}
    for path, part in model.parts.items():
        kind = "head" if isinstance(part.adapter, Dense) else "adapter"
        sums[kind] += sum(x.numel() for leaf, x in o.bench.tree[path].items() if leaf in part.adapter.trainable)
    leaves = {id(x) for part in model.parts.values() for x in part.leaves.values()}
    frozen = sum(x.numel() for x in model.network.parameters() if id(x) not in leaves)
    trained = sum(sums.values())
    return {
        **sums, "trainable": trained, "frozen": frozen, "share": trained / (frozen + trained),
        "weights_adapted": sum(path not in f.heads for path in model.parts), "ranks": sorted(set(f.budgets)),
    }  # fmt: skip


def _rows(f: Federation) -> dict[str, Any]:
    count, cohort = f.clients.count, f.clients.per_round or f.clients.count
    if f.data is None:
        return {"clients": count, "cohort": cohort, "rounds": f.rounds, "train": None, "test": None, "passes": None,
                "steps": None if f.training.local_epochs else f.training.steps(1)}  # fmt: skip
    train = [len(f.shards[k].train) for k in range(count)]
    steps = [f.training.steps(rows) for rows in train]
    seen = statistics.fmean(steps) * f.training.batch_size * f.training.accumulation_steps * f.rounds * cohort / count
    return {
        "clients": count,
        "cohort": cohort,
        "rounds": f.rounds,
        "train": train,
        "test": [len(f.shards[k].test) for k in range(count)],
        "steps": steps,
        "passes": seen / statistics.fmean(train),
    }


def byte_plan(o: Outline, crossing: Traffic | None = None) -> dict[str, Any]:
    """Bytes of the run by direction and kind, as its summary will have them, and of one client's round."""
    f = o.federation
    crossing = crossing or traffic(f, o.groups)
    turns = [len(f.clients.cohort(number, f.seed)) for number in range(f.rounds)]
    return {
        "exact": not crossing.varies,
        "run": {d: crossing.kinds(d) for d in ("up", "down")},
        "client": {
            d: {
                "first_round": crossing.a_client(d, True, turns[0]),
                "later_rounds": crossing.a_client(d, False, sum(turns[1:])),
            }
            for d in ("up", "down")
        },
    }


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
            for client in f.clients.cohort(number, f.seed):
                if found.counts.total() >= WATCHED:
                    found.complete = False
                    return found
                found.add(f, number, client, f.data.train)
        return found

    def add(self, f: Federation, number: int, client: int, examples: Examples) -> None:
        """One client's turn."""
        rows, self.turns = f.shards[client].train, self.turns + 1
        stream = batches(examples, rows, f.training, derived(f.turn(number, client).seed, "batches"))
        for _ in range(f.training.steps(len(rows)) * f.training.accumulation_steps):
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
        due = sum(f.evaluation.due(number, f.rounds) for number in range(f.rounds))
        turns = sum(len(f.clients.cohort(number, f.seed)) for number in range(f.rounds))
        run = self.each * turns + self.evaluating * due * f.clients.count
        return {"training": self.each, "evaluation": self.evaluating, "run": run}


def _measured(o: Outline, shapes: Shapes) -> Measured:
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


def _scored(o: Outline) -> tuple[Cost, float]:
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
    for client in range(f.clients.count):
        rows = f.shards[client].test
        parts = rows[test.lengths[rows].argsort(stable=True)].split(size) if len(rows) else ()
        own.append(sum(len(part) * at(int(test.lengths[part].max())) for part in parts))
    return max((cost for _, _, cost in costs), key=lambda cost: cost.peak), statistics.fmean(own)


def _trained(o: Outline) -> list[dict[str, frozenset[str]]]:
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


def _standing(o: Outline, path: str) -> str:
    return next(group.part for group in o.groups if group.layer is o.bench.tree[path])


def _stand_in(o: Outline) -> dict[str, Tensor]:
    """A batch of rows that nobody here has seen, each as long as the task lets it be."""
    probe = o.config.task.probe(o.federation.model.network)
    rows, width = o.federation.training.batch_size, getattr(o.config.task, "max_length", None)
    shapes = {
        name: torch.empty((rows, *((width,) if x.ndim == 2 and width else x.shape[1:])), dtype=x.dtype, device="meta")
        for name, x in probe.items()
    }
    return {**shapes, "labels": torch.empty(rows, dtype=torch.int64, device="meta")}


def _memory(o: Outline, crossing: Traffic, measured: Measured) -> dict[str, Any]:
    f, model = o.federation, o.federation.model
    weights = weight_bytes(model)
    stored = {x.untyped_storage()._cdata: x for part in model.parts.values() for x in part.leaves.values()}
    leaves = sum(x.numel() * x.element_size() for x in stored.values())
    kept_base = _kept_base(model) if crossing.folds and not model.overlay else 0
    folds = kept_base or (crossing.folds if model.overlay else 0)
    train, score = measured.train, measured.score
    uploads = max(sum(r.bytes for r in crossing.rows if r.direction == "up" and r.round == n) for n in range(f.rounds))
    moments = train.moments * f.clients.count if f.training.keep_optimizer else 0
    client = weights + 2 * leaves + folds + max(train.peak, score.peak)
    server = weights + 2 * leaves + folds + crossing.folds + uploads + crossing.combining
    work = max(train.peak, score.peak, crossing.combining)
    loading = sum(x.numel() * 4 for x in model.network.parameters())  # weights arrive in float32
    together = weights + 3 * leaves + folds + crossing.folds + uploads + crossing.kept + moments + work
    return {
        "weights": weights,
        "leaves": leaves,
        "gradients": train.gradients,
        "moments": train.moments,
        "activations": train.saved,
        "training_peak": train.peak,
        "evaluation_peak": score.peak,
        "folds": folds,
        "uploads": uploads,
        "combining": crossing.combining,
        "client": max(client, loading),
        "server": max(server, loading),
        "one_process": max(together, loading),
    }


def _kept_base(model: Model) -> int:
    """Bytes of the adapted weights: folding into them keeps them as they were."""
    parts = [part.module.base.weight for part in model.parts.values() if hasattr(part.module, "base")]
    return sum(x.numel() * x.element_size() for x in parts)


def _estimates(o: Outline, crossing: Traffic, shapes: Shapes) -> list[str]:
    """What of the plan is no exact figure, and why."""
    said = ["Memory counts tensors: Python, its libraries and the data come on top, and an allocator keeps some more."]
    if crossing.varies:
        said.append("Bytes depend on what training finds with these settings; they are those of a run without luck.")
    if not shapes.complete:
        said.append(f"Operations and memory are those of the run's first {WATCHED:,} batches.")
    if o.federation.data is None:
        said.append(
            "No rows are here: every row is taken to be as long as the task allows, and an evaluation is left out."
        )
    if o.bench.stood_in:
        said.append("The loss is taken over every position: which ones count depends on the rows.")
    return said


__all__ = ["asdict", "plan", "planned"]
