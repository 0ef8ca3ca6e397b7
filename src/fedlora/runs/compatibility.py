"""What a configuration's sections must be to each other, however it was made: from TOML or in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from fedlora.adapters import ADAPTERS, Adapter
from fedlora.engines import partition
from fedlora.engines.loop import ENGINES
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.registry import Registry
from fedlora.runs import privacy_compatibility as refusals
from fedlora.runs.sections import Sections
from fedlora.schema import ConfigError, Table, check_type, construct
from fedlora.security.attacks import ATTACKS
from fedlora.security.robust import ROBUST_RULES
from fedlora.tasks import TASKS

SECTIONS = (  # the dataclasses of a configuration, each a table of its own
    "model", "task", "clients", "adapter", "method", "training", "evaluation", "server", "privacy", "engine", "flower",
    "validation", "robust", "attack", "compression", "checkpoint",
)  # fmt: skip
REGISTRIES: Mapping[str, Registry] = {
    "task": TASKS, "adapter": ADAPTERS, "method": METHODS, "robust": ROBUST_RULES, "attack": ATTACKS,
}  # fmt: skip


def check(config: Sections) -> None:
    """``ValueError`` where settings exclude each other: said before anything is loaded."""
    if config.rounds < 1:
        raise ConfigError(f"rounds is {config.rounds}; a run needs at least 1.")
    check_adapter(type(config.method), config.table["method"]["name"], config.method.adapter)
    _check_quantised(config)
    config.server.check(config.method)
    config.compression.check(config.method, config.flower.secure_aggregation)
    config.checkpoint.check(config.method.personal, config.method.title)
    ENGINES.check(config.engine.name)
    for size in config.clients.remaining_sizes:
        config.flower.check(config.method, size)
    _check_trust(config)
    if config.engine.offload and config.evaluation.measure:
        raise ConfigError(
            "engine.offload keeps uploads on disk, but the error measures need them all; set "
            "evaluation.measure = false."
        )
    config.engine.chosen()  # a device that is not there is said before anything is loaded
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    _check_ranks(config, budgets)
    refusals.check(config.privacy, config.method, config.clients, budgets, config.task)


def _check_trust(config: Sections) -> None:
    """A rule or an attack that cannot work with the method, the task or hidden uploads is said before anything runs."""
    hidden = config.flower.secure_aggregation
    if config.robust is not None:
        config.robust.check(config.method, hidden)
        if config.privacy.sums_clients:
            raise ConfigError(
                "[robust] lets one client's upload decide about another's, so privacy.noise_on = 'sum' cannot bound "
                'what one client changes; set privacy.noise_on = "upload", or leave [robust] out.'
            )
    if config.attack is not None:
        config.attack.check(config.method, config.task, hidden)


def _check_quantised(config: Sections) -> None:
    if config.model.quantize is not None and not config.task.quantizes:
        able = [other for other, kind in TASKS.classes().items() if kind.quantizes]
        name = config.table["task"]["name"]
        raise ConfigError(
            f"model.quantize is {config.model.quantize!r}, but {name!r} trains its base's head in full; leave it out, "
            f"or take {' or '.join(map(repr, able))}."
        )


def _check_ranks(config: Sections, budgets: Sequence[int]) -> None:
    name = config.table["method"]["name"]
    if not config.method.any_rank and len(set(budgets)) > 1:
        able = [other for other, kind in METHODS.classes().items() if kind.any_rank]
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


def check_adapter(method: type[Method], name: str, adapter: Adapter) -> None:
    """``ConfigError`` where a method is not defined for an adapter."""
    if not isinstance(adapter, method.adapters):
        allowed = [key for key, value in ADAPTERS.classes().items() if issubclass(value, method.adapters)]
        raise ConfigError(
            f"the method {name!r} is not defined for adapter.name = {ADAPTERS.name_of(type(adapter))!r}; "
            f"set it to {' or '.join(map(repr, allowed))}."
        )


def resolve(config: Sections) -> Table:
    """Every setting of a run with its default written out; ``None`` has no TOML form and is left out.

    ``ConfigError`` for a section or a value that no TOML could have made.
    """
    found: Table = {key: check_type(key, getattr(config, key), int) for key in ("rounds", "seed")}
    adapter = _section(config, "method").adapter
    objects = {s: adapter if s == "adapter" else _section(config, s) for s in SECTIONS}
    for section, value in ((k, v) for k, v in objects.items() if v is not None):
        table = _as_table(value)
        extra = {"adapter": value.adapter} if section == "method" else {}
        construct(type(value), section, table, skip=("adapter",) if extra else (), **extra)
        registry = REGISTRIES.get(section)
        found[section] = table if registry is None else {"name": registry.name_of(type(value)), **table}
    if config.track.trackers:
        found["track"] = config.track.table()
    if not config.privacy.on:
        del found["privacy"]
    if config.training.local_epochs is None:
        found["training"]["local_steps"] = config.training.steps(1)
    found["clients"]["partition"] = partition.resolve_partition(config.clients.partition)
    return found


def _section(config: Sections, section: str) -> Any:
    value = getattr(config, section)
    optional = section in ("robust", "attack")
    if not (is_dataclass(value) and not isinstance(value, type)) and not (optional and value is None):
        raise ConfigError(f"{section} is {value!r}; it should be an object of its settings, as fedlora.read makes it.")
    return value


def _as_table(value: Any) -> Table:
    found = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if item is None or isinstance(item, Adapter) or f.name.startswith("_"):
            continue
        found[f.name] = item
    return found
