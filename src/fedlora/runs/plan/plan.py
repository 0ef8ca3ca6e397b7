"""What a run will take, before anything is spent: numbers, bytes, memory and operations, without pretrained weights."""

from collections.abc import Sequence
from typing import Any

from fedlora.adapters import Dense
from fedlora.engines.federation import Federation
from fedlora.runs.compare import for_label
from fedlora.runs.config import Config, ConfigError, Table, build
from fedlora.runs.plan.compute import WATCHED, Measured, Shapes, measured
from fedlora.runs.plan.footprint import weight_bytes
from fedlora.runs.plan.meta_model import MetaModel, build_meta_model
from fedlora.runs.plan.traffic import Traffic, traffic
from fedlora.training.model import AdaptedLinear, Model


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


def problems(table: Table) -> list[str]:
    """All that is wrong with a configuration, a sentence each: section by section, then together."""
    own = {key: value for key, value in table.items() if key != "compare"}
    try:
        build(own)
    except ValueError as error:
        found = [_problem_of(own, key) for key in own]
        return list(dict.fromkeys(text for text in (*found, str(error)) if text is not None))
    return []


def _problem_of(own: Table, key: str) -> str | None:
    """What is wrong with one section; with the method's defaults where it is the method that is wrong."""
    others = {k: own[k] for k in WITH.get(key, ()) if k in own}
    wrong = _problem({**SOUND, **others})
    return _problem({**SOUND, **({} if wrong else others), key: own[key]})


def _problem(table: Table) -> str | None:
    try:
        build(table)
    except ValueError as error:
        return str(error)
    return None


# What a section can only be judged with.
WITH = {"adapter": ("method",), "method": ("adapter",), "server": ("method", "adapter")}
WITH |= {"clients": ("method", "adapter"), "flower": ("method", "adapter", "clients")}
WITH |= {"privacy": ("method", "adapter", "clients")}
SOUND: Table = {
    "model": {"name": "demo-vit"},
    "task": {"name": "image-classification", "data": "digits"},
}  # a configuration in which one section at a time is looked at


def _plan_of(table: Table, label: str | None) -> dict[str, Any]:
    base = {key: value for key, value in table.items() if key != "compare"}
    name = label or table.get("method", {}).get("name", "fedit")
    try:
        return {"method": name, **plan(build(for_label(table, label) if label else base))}
    except ValueError as error:
        return {"method": name, "problem": str(error)}


def plan(config: Config) -> dict[str, Any]:
    """One run's plan, JSON-able. ``ValueError`` says what the run would stop at."""
    o = build_meta_model(config)
    crossing = traffic(o.federation, o.groups)
    shapes = Shapes.of(o.federation)
    work = measured(o, shapes)
    return {
        "title": config.method.title,
        "options": options(config, crossing),
        "numbers": _numbers(o),
        "rows": _rows(o.federation),
        **o.federation.privacy_ledger.report(config.rounds, plan=True),
        "bytes": byte_plan(o, crossing),
        "memory": _memory(o, crossing, work),
        "flops": work.flops(o.federation),
        "estimates": _estimates(o, crossing, shapes),
    }


def options(config: Config, crossing: Traffic) -> dict[str, Any]:
    """What the method can do, and what these settings ask of it."""
    method, base_updates = config.method, crossing.base_updates > 0
    return {
        "exact": bool(method.exact),
        "any_rank": method.any_rank,
        "secure_aggregation": method.sums,
        "server_optimizer": method.averages,
        "quantised_base": "base updates are kept beside it" if base_updates else "yes",
        "partial_participation": "who was absent is sent the base updates it missed" if base_updates else "yes",
        "result": "a model for each client" if method.personal else "one model for all",
        "head": "shared" if method.shares_head else "each client's own",
        "weighting": method.weighting,
    }


def _numbers(o: MetaModel) -> dict[str, Any]:
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
    count = f.clients.members
    cohort = f.clients.per_round or count
    if f.data is None:
        return {"clients": count, "cohort": cohort, "rounds": f.rounds, "train": None, "test": None, "passes": None,
                "steps": None if f.training.local_epochs else f.training.steps(1)}  # fmt: skip
    train = [len(f.shards[k].train) for k in range(count)]
    turns = [(number, client) for number in range(f.rounds) for client in f.clients.remaining(number, f.seed)]
    taken = sum(f.training_of(*turn).steps(train[turn[1]]) for turn in turns)
    return {
        "clients": count,
        "cohort": cohort,
        "rounds": f.rounds,
        "train": train,
        "test": [len(f.shards[k].test) for k in range(count)],
        "steps": [f.training_of(0, client).steps(rows) for client, rows in enumerate(train)],  # of the first round
        "passes": taken * f.training.batch_size * f.training.accumulation_steps / sum(train),
    }


def byte_plan(o: MetaModel, crossing: Traffic | None = None) -> dict[str, Any]:
    """Bytes of the run by direction and kind, as its summary will have them, and of one client's round."""
    f = o.federation
    crossing = crossing or traffic(f, o.groups)
    turns = [len(f.clients.remaining(number, f.seed)) for number in range(f.rounds)]
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


def _memory(o: MetaModel, crossing: Traffic, spent: Measured) -> dict[str, Any]:
    f, model = o.federation, o.federation.model
    weights = weight_bytes(model)
    stored = {x.untyped_storage()._cdata: x for part in model.parts.values() for x in part.leaves.values()}
    leaves = sum(x.numel() * x.element_size() for x in stored.values())
    kept_base = _kept_base(model) if crossing.base_updates and not model.overlay else 0
    base_updates = kept_base or (crossing.base_updates if model.overlay else 0)
    train, score = spent.train, spent.score
    up = [row for row in crossing.rows if row.direction == "up"]
    uploads = max(sum(4 * row.numbers for row in up if row.round == n) for n in range(f.rounds))  # decoded, float32
    moments = train.moments * f.clients.members if f.training.keep_optimizer else 0
    client = weights + 2 * leaves + base_updates + max(train.peak, score.peak)
    server = weights + 2 * leaves + base_updates + crossing.base_updates + uploads + crossing.combining
    work = max(train.peak, score.peak, crossing.combining)
    loading = sum(x.numel() * 4 for x in model.network.parameters())  # weights arrive in float32
    together = weights + 3 * leaves + base_updates + crossing.base_updates + uploads + crossing.kept + moments + work
    return {
        "weights": weights,
        "leaves": leaves,
        "gradients": train.gradients,
        "moments": train.moments,
        "activations": train.saved,
        "training_peak": train.peak,
        "evaluation_peak": score.peak,
        "base_updates": base_updates,
        "uploads": uploads,
        "combining": crossing.combining,
        "client": max(client, loading),
        "server": max(server, loading),
        "one_process": max(together, loading),
    }


def _kept_base(model: Model) -> int:
    """Bytes of the adapted weights: folding into them keeps them as they were."""
    parts = [part.module.base.weight for part in model.parts.values() if isinstance(part.module, AdaptedLinear)]
    return sum(x.numel() * x.element_size() for x in parts)


def _estimates(o: MetaModel, crossing: Traffic, shapes: Shapes) -> list[str]:
    """What of the plan is no exact figure, and why."""
    said = [
        "Memory counts tensors. Python, its libraries and the data come on top (about 600 MB), and gaps between "
        'blocks: with engine.allocator = "keep" processes took 1.4 to 3 times as much, with "return" '
        "as much as is said here."
    ]
    if o.config.model.quantize is not None:
        said.append("Memory is that of a base in float32: what model.quantize saves is not taken off.")
    if o.federation.data is not None and o.federation.data.test.texts is not None:
        said.append("Answers are generated in every evaluation: what that takes is not counted.")
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
