"""TOML in, frozen dataclasses out: the only place that turns a name into a class.

Each table holds the keyword arguments of one constructor, so the dataclasses are the schema and there is no second
list. What is wrong is said in one sentence with the key, the value, and what would do.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fedlora import attacks, defences, methods, splits, tasks, trackers
from fedlora.adapters import KINDS, Adapter
from fedlora.clients import Clients
from fedlora.composition import Config, ModelTable, fingerprint
from fedlora.engines.flower.settings import Network
from fedlora.engines.retention import Retention
from fedlora.evaluation import Evaluation
from fedlora.hygiene import Hygiene
from fedlora.method import Method
from fedlora.nearest import unknown
from fedlora.optimizers import ServerOptimizer
from fedlora.privacy import Privacy, refusals
from fedlora.runtime import Engine
from fedlora.settings import ConfigError, Table, construct, dumps, known, merged, overridden, read_table, typed
from fedlora.tasks.task import Task
from fedlora.training import Training
from fedlora.transport import Transport

__all__ = [
    "Config", "ConfigError", "ModelTable", "Table", "build", "construct", "dumps", "fingerprint", "merged",
    "overridden", "read", "read_table",
]  # fmt: skip

SECTIONS = (
    "model", "task", "clients", "adapter", "method", "training", "evaluation", "server", "privacy", "engine", "flower",
    "hygiene", "robust", "attack", "transport", "checkpoint", "track", "compare",
)  # fmt: skip
APART = ("track", "compare")  # sections that are no arguments of one dataclass


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A config from a TOML file; ``overrides`` are ``key=value`` with dotted keys and TOML values."""
    return build(overridden(read_table(path), overrides))


def build(table: Table) -> Config:
    """Checks a table and builds its objects. ``ConfigError`` says what is wrong with it."""
    top = {"rounds": int, "seed": int}
    known("", table, [*top, *SECTIONS])
    for section in ("model", "task"):
        if section not in table:
            raise ConfigError(f"the configuration has no [{section}] table; it needs one, e.g. {EXAMPLES[section]}.")
    numbers = {key: typed(key, table[key], kind) for key, kind in top.items() if key in table}
    if numbers.get("rounds", 1) < 1:
        raise ConfigError(f"rounds is {numbers['rounds']}; a run needs at least 1.")
    method = _method(_section(table, "method", {"name": "fedit"}), table.get("adapter"))
    parts = {
        "model": construct(ModelTable, "model", _section(table, "model")),
        "task": named("task", _section(table, "task"), tasks.load),
        "method": method,
        "clients": construct(Clients, "clients", _section(table, "clients")),
        "training": construct(Training, "training", _section(table, "training")),
        "evaluation": construct(Evaluation, "evaluation", _section(table, "evaluation")),
        "server": construct(ServerOptimizer, "server", _section(table, "server")),
        "privacy": construct(Privacy, "privacy", _section(table, "privacy")),
        "engine": construct(Engine, "engine", _section(table, "engine")),
        "flower": construct(Network, "flower", _section(table, "flower")),
        "hygiene": construct(Hygiene, "hygiene", _section(table, "hygiene")),
        "robust": _optional(table, "robust", defences.load),
        "attack": _optional(table, "attack", attacks.load),
        "transport": construct(Transport, "transport", _section(table, "transport")),
        "checkpoint": construct(Retention, "checkpoint", _section(table, "checkpoint")),
        "track": trackers.read(_section(table, "track")),
    }
    _check_quantised(parts["model"], parts["task"], table["task"]["name"])
    parts["server"].check(method)
    parts["transport"].check(method, parts["flower"].secure_aggregation)
    parts["checkpoint"].check(method.personal, method.title)
    able = [name for name in methods.names() if methods.load(name).sums]
    for size in parts["clients"].staying_sizes:
        parts["flower"].check(method, size, able)
    _check_trust(parts)
    if parts["engine"].spill and parts["evaluation"].measure:
        raise ConfigError(
            "engine.spill keeps uploads on disk, and the error measures need them all; set evaluation.measure = false."
        )
    config = Config(**parts, **numbers)
    config.engine.chosen()  # a device that is not there is said before anything is loaded
    _check_ranks(config, _section(table, "method").get("name", "fedit"))
    budgets = config.clients.budgets(method.adapter.budget, config.seed)
    refusals.check(config.privacy, method, config.clients, budgets, config.task)
    return replace(config, table=_resolved(config, table))


EXAMPLES = {
    "model": '[model] name = "roberta-base"',
    "task": '[task] name = "text-classification", data = "my-folder"',
}


def _section(table: Table, key: str, default: Table | None = None) -> Table:
    value = table.get(key, default or {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {value!r}; it is a table, e.g. [{key}].")
    return value


def _method(table: Table, adapter_table: Any) -> Method:
    name = table.get("name", "fedit")
    if not isinstance(name, str):
        raise ConfigError(f"method.name is {name!r}; it must be a string.")
    kind = methods.load(name)
    adapter = _adapter(adapter_table) if adapter_table is not None else None
    if adapter is not None and not isinstance(adapter, kind.adapters):
        allowed = [key for key, value in KINDS.items() if issubclass(value, kind.adapters)]
        found = adapter_table.get("name", "lora")
        raise ConfigError(
            f"the method {name!r} is not defined for adapter.name = {found!r}; "
            f"set it to {' or '.join(map(repr, allowed))}."
        )
    values = {k: v for k, v in table.items() if k != "name"}
    extra = {"adapter": adapter} if adapter is not None else {}
    return construct(kind, "method", values, skip=("adapter",), **extra)


def _adapter(table: Any) -> Adapter:
    if not isinstance(table, dict):
        raise ConfigError(f'adapter is {table!r}; it is a table, e.g. adapter = {{ name = "lora", rank = 8 }}.')
    return named("adapter", {"name": "lora", **table}, _adapter_kind)


def _adapter_kind(name: str) -> type[Adapter]:
    if name not in KINDS:
        raise ConfigError(unknown("adapter", name, KINDS, "adapters"))
    return KINDS[name]


def named(section: str, table: Table, load) -> Any:
    """Builds the class that ``name`` picks from the rest of its table."""
    if not isinstance(table.get("name"), str):
        raise ConfigError(f"[{section}] has no name; set {section}.name to a string.")
    return construct(load(table["name"]), section, {k: v for k, v in table.items() if k != "name"})


def _optional(table: Table, section: str, load) -> Any:
    """The same of a table that may be left out."""
    return named(section, _section(table, section), load) if section in table else None


def _check_trust(parts: dict[str, Any]) -> None:
    """A rule or an attack that cannot work with the method, the task or hidden uploads is said before anything runs."""
    hidden = parts["flower"].secure_aggregation
    if parts["robust"] is not None:
        parts["robust"].check(parts["method"], hidden)
        if parts["privacy"].sums_clients:
            raise ConfigError(
                "[robust] lets one client's upload decide about another's, so privacy.noise_on = 'sum' cannot bound "
                'what one client changes; set privacy.noise_on = "upload", or leave [robust] out.'
            )
    if parts["attack"] is not None:
        parts["attack"].check(parts["method"], parts["task"], hidden)


def _check_quantised(model: ModelTable, task: Task, name: str) -> None:
    if model.quantize is not None and not task.quantizes:
        able = [other for other in tasks.names() if tasks.load(other).quantizes]
        raise ConfigError(
            f"model.quantize is {model.quantize!r}, but {name!r} trains its base's head in full; leave it out, or take "
            f"{' or '.join(map(repr, able))}."
        )


def _check_ranks(config: Config, name: str) -> None:
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    if not config.method.any_rank and len(set(budgets)) > 1:
        able = [other for other in methods.names() if methods.load(other).any_rank]
        key, instead = "ranks", "set one number"
        if config.clients.capability is not None:
            key, instead = "capability", 'take "rank" out of clients.capability_scales'
        raise ConfigError(
            f"clients.{key} gives the clients ranks {sorted(set(budgets))}, but {name!r} needs one rank for all; "
            f"{instead}, or take {' or '.join(map(repr, able))}."
        )
    if config.training.local_epochs is not None and config.clients.local_steps is not None:
        raise ConfigError("clients.local_steps and training.local_epochs are both set; keep one of them.")
    if not config.method.any_rank and set(budgets) != {config.method.adapter.budget}:
        raise ConfigError(
            f"clients.ranks is {budgets[0]}, but adapter.rank is {config.method.adapter.budget}; "
            f"{name!r} needs them equal: leave clients.ranks out."
        )


def _resolved(config: Config, table: Table) -> Table:
    """Every setting of the run with its default written out; ``None`` has no TOML form and is left out."""
    adapter = {"name": next(k for k, v in KINDS.items() if type(config.method.adapter) is v)}
    named = [key for key in ("task", "robust", "attack") if key in table]
    names = {key: {"name": table[key]["name"]} for key in named} | {"adapter": adapter}
    names["method"] = {"name": table.get("method", {}).get("name", "fedit")}
    found: Table = {"rounds": config.rounds, "seed": config.seed}
    objects = {s: config.method.adapter if s == "adapter" else getattr(config, s) for s in SECTIONS if s not in APART}
    for section, value in ((k, v) for k, v in objects.items() if v is not None):
        found[section] = {**names.get(section, {}), **_as_table(value)}
    if config.track.trackers:
        found["track"] = config.track.table()
    if not config.privacy.on:
        del found["privacy"]
    if config.training.local_epochs is None:
        found["training"]["local_steps"] = config.training.steps(1)
    found["clients"]["split"] = splits.resolved(config.clients.split)
    return found


def _as_table(value: Any) -> Table:
    found = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if item is None or isinstance(item, Adapter) or f.name.startswith("_"):
            continue
        found[f.name] = item
    return found
