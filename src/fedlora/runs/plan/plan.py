"""Plan a run without pretrained weights: its parameters, rows, bytes, memory and operations."""

from collections.abc import Sequence
from typing import Any

from fedlora.adapters import Dense
from fedlora.engines.federation import Federation
from fedlora.runs.compare import for_label, own_method
from fedlora.runs.config import Config, build
from fedlora.runs.plan.compute import MAX_BATCHES, Bench, ComputeEstimate, Shapes, estimate_compute
from fedlora.runs.plan.meta_model import MetaModel, build_meta_model
from fedlora.runs.plan.traffic import Traffic, estimate_traffic
from fedlora.schema import ConfigError, Table
from fedlora.training.parts import AdaptedLinear

# A configuration in which one section at a time is checked, and the other sections that a section is checked with.
SOUND: Table = {"model": {"name": "demo-vit"}, "task": {"name": "image-classification", "data": "digits"}}
NEEDED = {
    "adapter": ("method",),
    "method": ("adapter",),
    "server": ("method", "adapter"),
    "clients": ("method", "adapter"),
    "flower": ("method", "adapter", "clients"),
    "privacy": ("method", "adapter", "clients"),
}


def plan_methods(table: Table, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return a plan for each method, or for the table's; a method that cannot be run has a ``problem``.

    Raises ``ConfigError`` if none can be run.
    """
    plans = []
    base = {key: value for key, value in table.items() if key != "compare"}
    for label in dict.fromkeys(labels or [None]):
        name = label or own_method(table)
        try:
            plans.append({"method": name, **plan_run(build(for_label(table, label) if label else base))})
        except ValueError as error:
            plans.append({"method": name, "problem": str(error)})
    if all("problem" in plan for plan in plans):
        raise ConfigError(plans[0]["problem"])
    return plans


def find_problems(table: Table) -> list[str]:
    """Return all errors of a configuration, a sentence each: those of each section, then those of all together."""
    table = {key: value for key, value in table.items() if key != "compare"}
    error = _error_of(table)
    if error is None:
        return []
    errors = []
    for key in table:
        others = {k: table[k] for k in NEEDED.get(key, ()) if k in table}
        if _error_of({**SOUND, **others}):  # the others are wrong themselves
            others = {}
        errors.append(_error_of({**SOUND, **others, key: table[key]}))
    return list(dict.fromkeys(text for text in (*errors, error) if text is not None))


def _error_of(table: Table) -> str | None:
    try:
        build(table)
    except ValueError as error:
        return str(error)
    return None


def plan_run(config: Config) -> dict[str, Any]:
    """Return the plan of one run. Raises the ``ValueError`` that the run would raise."""
    meta = build_meta_model(config)
    f = meta.federation
    traffic = estimate_traffic(f, meta.groups)
    shapes, bench = Shapes.of(f), Bench(meta)
    compute = estimate_compute(meta, bench, shapes)
    return {
        "title": config.method.title,
        "options": _options(config, traffic),
        "numbers": _numbers(meta),
        "rows": _rows(f),
        **f.privacy_ledger.report(config.rounds, plan=True),
        "bytes": plan_bytes(meta, traffic),
        "memory": _memory(meta, traffic, compute),
        "flops": compute.flops(f),
        "estimates": _estimates(meta, traffic, shapes, bench),
    }


def _options(config: Config, traffic: Traffic) -> dict[str, Any]:
    """Return the method's properties with these settings."""
    method, has_updates = config.method, traffic.base_updates > 0
    return {
        "exact": bool(method.exact),
        "any_rank": method.any_rank,
        "secure_aggregation": method.sums,
        "server_optimizer": method.averages,
        "quantised_base": "base updates are kept beside it" if has_updates else "yes",
        "partial_participation": "who was absent is sent the base updates it missed" if has_updates else "yes",
        "result": "a model for each client" if method.personal else "one model for all",
        "head": "shared" if method.shares_head else "each client's own",
        "weighting": method.weighting,
    }


def _numbers(meta: MetaModel) -> dict[str, Any]:
    f, model = meta.federation, meta.federation.model
    sums = {"adapter": 0, "head": 0}
    for path, part in model.parts.items():
        kind = "head" if isinstance(part.adapter, Dense) else "adapter"
        sums[kind] += sum(x.numel() for leaf, x in meta.tree[path].items() if leaf in part.adapter.trainable)
    leaves = {id(x) for part in model.parts.values() for x in part.leaves.values()}
    frozen = sum(x.numel() for x in model.network.parameters() if id(x) not in leaves)
    trained = sum(sums.values())
    return {
        **sums, "trainable": trained, "frozen": frozen, "share": trained / (frozen + trained),
        "weights_adapted": sum(path not in f.heads for path in model.parts), "ranks": sorted(set(f.budgets)),
    }  # fmt: skip


def _rows(f: Federation) -> dict[str, Any]:
    """Count the clients' rows and steps; None for rows on other machines."""
    count = f.clients.members
    rows = {"clients": count, "cohort": f.clients.per_round or count, "rounds": f.rounds}
    if f.data is None:
        steps = None if f.training.local_epochs else f.training.steps(1)
        return rows | {"train": None, "test": None, "passes": None, "steps": steps}
    train = [len(f.shards[k].train) for k in range(count)]
    turns = [(number, client) for number in range(f.rounds) for client in f.clients.remaining(number, f.seed)]
    steps = sum(f.training_of(*turn).steps(train[turn[1]]) for turn in turns)
    return rows | {
        "train": train,
        "test": [len(f.shards[k].test) for k in range(count)],
        "steps": [f.training_of(0, client).steps(size) for client, size in enumerate(train)],  # of the first round
        "passes": steps * f.training.batch_size * f.training.accumulation_steps / sum(train),
    }


def plan_bytes(meta: MetaModel, traffic: Traffic | None = None) -> dict[str, Any]:
    """Return the bytes of the run by direction and kind, as its summary has them, and of one client in a round."""
    f = meta.federation
    traffic = traffic or estimate_traffic(f, meta.groups)
    first, *later = [len(f.clients.remaining(number, f.seed)) for number in range(f.rounds)]
    return {
        "exact": not traffic.varies,
        "run": {d: traffic.kinds(d) for d in ("up", "down")},
        "client": {
            d: {
                "first_round": traffic.by_client(d, True, first),
                "later_rounds": traffic.by_client(d, False, sum(later)),
            }
            for d in ("up", "down")
        },
    }


def _memory(meta: MetaModel, traffic: Traffic, compute: ComputeEstimate) -> dict[str, Any]:
    """Return the bytes of the tensors of a client, of the server and of one process that is both."""
    f, train, score = meta.federation, compute.train, compute.score
    model, loading = f.model, meta.loading
    stored = {x.untyped_storage()._cdata: x for part in model.parts.values() for x in part.leaves.values()}
    leaves = sum(x.nbytes for x in stored.values())
    ids = {id(x) for part in model.parts.values() for x in part.leaves.values()}
    network = (*model.network.parameters(), *model.network.buffers())
    weights = sum({id(x): x.nbytes for x in network if id(x) not in ids}.values())  # a tied weight counts once
    base_updates = traffic.fold_sum if model.overlay else 0
    if traffic.base_updates and not model.overlay:  # a copy of the adapted weights from before the updates
        parts = [part.module.base.weight for part in model.parts.values() if isinstance(part.module, AdaptedLinear)]
        base_updates = sum(x.nbytes for x in parts)
    up = [row for row in traffic.rows if row.direction == "up"]
    uploads = max(sum(4 * row.numbers for row in up if row.round == n) for n in range(f.rounds))  # decoded, float32
    moments = train.moments * f.clients.members if f.training.keep_optimizer else 0
    client = weights + 2 * leaves + base_updates + max(train.peak, score.peak)
    server = weights + 2 * leaves + base_updates + traffic.base_updates + uploads + traffic.combining
    work = max(train.peak, score.peak, traffic.combining)
    together = weights + 3 * leaves + base_updates + traffic.base_updates + uploads + traffic.kept + moments + work
    return {
        "weights": weights,
        "leaves": leaves,
        "gradients": train.gradients,
        "moments": train.moments,
        "activations": train.saved,
        "training_peak": train.peak,
        "evaluation_peak": score.peak,
        "base_updates": base_updates,
        "base_updates_a_round": traffic.fold_round if model.overlay else 0,
        "base_updates_at_most": traffic.fold_bound if model.overlay else base_updates,
        "uploads": uploads,
        "combining": traffic.combining,
        "client": max(client, loading),
        "server": max(server, loading),
        "one_process": max(together, loading),
    }


def _estimates(meta: MetaModel, traffic: Traffic, shapes: Shapes, bench: Bench) -> list[str]:
    """Explain the figures that are not exact."""
    data = meta.federation.data
    texts = [
        "Memory counts tensors. Python, its libraries and the data come on top (about 600 MB), and gaps between "
        'blocks: with engine.allocator = "keep" processes took 1.4 to 3 times as much, with "return" '
        "as much as is said here."
    ]
    if meta.config.model.quantize is not None:
        texts.append("Memory is that of the base as it is published: what model.quantize saves is not taken off.")
    if traffic.fold_bound and meta.federation.model.overlay:
        texts.append(
            f"Folding keeps its sum beside the base: up to {traffic.fold_round / 1e6:,.1f} MB more a round, at most "
            f"{traffic.fold_bound / 1e6:,.1f} MB. model.overlay = false adds it to the weights; in bfloat16 that loses "
            "part of each update."
        )
    if data is not None and data.test.texts is not None:
        texts.append("Answers are generated in every evaluation: what that takes is not counted.")
    if data is not None and "choice_ids" in data.test.features:
        texts.append("Every choice is scored in every evaluation: only the right one of each row is counted.")
    if traffic.varies:
        texts.append("Bytes depend on the values that training finds; these are the bytes of stand-ins.")
    if not shapes.is_complete:
        texts.append(f"Operations and memory are those of the run's first {MAX_BATCHES:,} batches.")
    if data is None:
        texts.append("No rows are here: every row is assumed to have the maximal length, without an evaluation.")
    if bench.is_approximate:
        texts.append("The loss is taken over every position: which ones are learnt depends on the rows.")
    return texts
