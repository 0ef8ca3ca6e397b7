"""TOML in, frozen dataclasses out: the only place that turns a name into a class.

Each table holds the keyword arguments of one constructor, so the dataclasses are the schema and there is no second
list. What is wrong is said in one sentence with the key, the value, and what would do.
"""

import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedlora import methods, splits, tasks
from fedlora.adapters import KINDS, Adapter, Dense
from fedlora.clients import Clients
from fedlora.engines.flower.settings import Network
from fedlora.engines.loop import Federation
from fedlora.evaluation import Evaluation
from fedlora.method import Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.local import Local
from fedlora.model import Model, Precision
from fedlora.nearest import unknown
from fedlora.optimizers import ServerOptimizer
from fedlora.runtime import Engine, checkpoint_activations
from fedlora.start import begin
from fedlora.tasks.task import Task
from fedlora.training import Training


class ConfigError(ValueError):
    """A user's mistake in a configuration; its text is one sentence."""


@dataclass(frozen=True)
class ModelTable:
    """The ``[model]`` table."""

    name: str  # a hub id or a local folder
    targets: list[str] | None = None  # modules to adapt; None: the family's query and value projections
    head: list[str] | None = None  # modules trained in full; None: what the task put on top
    start: str | None = None  # a PEFT adapter folder, held by every party, that adapters and head begin with
    overlay: bool | None = None  # keep folds beside the base weights; None: where these are multiplied in bfloat16


Table = dict[str, Any]
SECTIONS = (
    "model", "task", "clients", "adapter", "method", "training", "evaluation", "server", "engine", "flower", "compare",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A whole run, checked. ``table`` is the resolved TOML, every default written out: enough to repeat the run."""

    model: ModelTable
    task: Task
    method: Method
    clients: Clients = field(default_factory=Clients)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    engine: Engine = field(default_factory=Engine)
    flower: Network = field(default_factory=Network)
    rounds: int = 20
    seed: int = 0
    table: Table = field(default_factory=dict)

    def federation(self) -> Federation:
        """Loads the model and the data, and builds what an engine runs."""
        device = self.engine.prepare()
        data = self.task.load(self.model.name, self.seed, self.clients.client_column)
        shards = self.clients.shards(data, self.seed)
        network = self.task.network(self.model.name, len(data.label_names), self.seed)
        training = self.engine.resolved(self.training, network)
        if training.gradient_checkpointing:
            checkpoint_activations(network)
        model = self.attached(network, typing.cast(Any, training.precision), device)
        rules = model.rules(self.method, self.head_rule)
        if self.model.start is not None:
            begin(model, rules, self.method, self.model.start, self.seed)
        budgets = self.clients.budgets(self.method.adapter.budget, self.seed)
        return Federation(
            rules, self.method, model, self.task, data, self.clients, shards, budgets,
            training, self.evaluation, self.server, self.rounds, self.seed,
        )  # fmt: skip

    def attached(self, network: nn.Module, precision: Precision = "float32", device: Any = "cpu") -> Model:
        """The network with this configuration's adapters."""
        table = self.model
        return Model.attach(network, self.method.adapter, table.targets, table.head, precision, device, table.overlay)

    def head_rule(self, dense: Dense) -> Method:
        """How a part trained in full is combined: with the method's own weights, or not at all."""
        return (FedIT if self.method.shares_head else Local)(dense, self.method.weighting)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A config from a TOML file; ``overrides`` are ``key=value`` with dotted keys and TOML values."""
    return build(overridden(read_table(path), overrides))


def read_table(path: str | Path) -> Table:
    """A TOML file as it stands."""
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {str(path)!r}; name a .toml file.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{str(path)!r} is a folder; name a .toml file in it.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}.") from error


def overridden(table: Table, overrides: Sequence[str]) -> Table:
    """The table with ``a.b=value`` set; a value that is no TOML is taken as a string."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"the override {item!r} has no '='; write it as key=value, e.g. rounds=5.")
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = text
        table = merged(table, _nested(key.strip().split("."), value))
    return table


def merged(table: Mapping, other: Mapping) -> Table:
    """``other`` laid over ``table``, table by table; another ``name`` starts its table anew."""
    both = dict(table) if other.get("name", table.get("name")) == table.get("name") else {}
    for key, value in other.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def _nested(keys: list[str], value: Any) -> Table:
    return {keys[0]: value if len(keys) == 1 else _nested(keys[1:], value)}


def build(table: Table) -> Config:
    """Checks a table and builds its objects. ``ConfigError`` says what is wrong with it."""
    top = {"rounds": int, "seed": int}
    _known("", table, [*top, *SECTIONS])
    for section in ("model", "task"):
        if section not in table:
            raise ConfigError(f"the configuration has no [{section}] table; it needs one, e.g. {EXAMPLES[section]}.")
    numbers = {key: _typed(key, table[key], kind) for key, kind in top.items() if key in table}
    if numbers.get("rounds", 1) < 1:
        raise ConfigError(f"rounds is {numbers['rounds']}; a run needs at least 1.")
    method = _method(_section(table, "method", {"name": "fedit"}), table.get("adapter"))
    parts = {
        "model": construct(ModelTable, "model", _section(table, "model")),
        "task": _named("task", _section(table, "task"), tasks.load),
        "method": method,
        "clients": construct(Clients, "clients", _section(table, "clients")),
        "training": construct(Training, "training", _section(table, "training")),
        "evaluation": construct(Evaluation, "evaluation", _section(table, "evaluation")),
        "server": construct(ServerOptimizer, "server", _section(table, "server")),
        "engine": construct(Engine, "engine", _section(table, "engine")),
        "flower": construct(Network, "flower", _section(table, "flower")),
    }
    parts["server"].check(method)
    if parts["engine"].spill and parts["evaluation"].measure:
        raise ConfigError(
            "engine.spill keeps uploads on disk, and the error measures need them all; set evaluation.measure = false."
        )
    config = Config(**parts, **numbers)
    config.engine.chosen()  # a device that is not there is said before anything is loaded
    _check_ranks(config, _section(table, "method", {"name": "fedit"})["name"])
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
    return _named("adapter", {"name": "lora", **table}, _adapter_kind)


def _adapter_kind(name: str) -> type[Adapter]:
    if name not in KINDS:
        raise ConfigError(unknown("adapter", name, KINDS, "adapters"))
    return KINDS[name]


def _named(section: str, table: Table, load) -> Any:
    """Builds the class that ``name`` picks from the rest of its table."""
    if not isinstance(table.get("name"), str):
        raise ConfigError(f"[{section}] has no name; set {section}.name to a string.")
    return construct(load(table["name"]), section, {k: v for k, v in table.items() if k != "name"})


def construct(cls: Any, path: str, table: Table, skip: tuple[str, ...] = (), **ready: Any) -> Any:
    """An instance of a dataclass from a table: unknown keys, missing keys and wrong types are ``ConfigError``s."""
    settable = [f for f in fields(cls) if f.init and f.name not in skip and not f.name.startswith("_")]
    _known(path, table, [f.name for f in settable])
    missing = [f.name for f in settable if f.default is f.default_factory is MISSING and f.name not in table]
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing; {cls.__name__} needs it.")
    hints = typing.get_type_hints(cls)
    values = {key: _typed(f"{path}.{key}", value, hints[key]) for key, value in table.items()}
    try:
        return cls(**values, **ready)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _typed(path: str, value: Any, kind: Any) -> Any:
    if isinstance(value, float) and value != value:
        raise ConfigError(f"{path} is nan; it should be a number.")
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)  # "8" is no int, but 8 is a float
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors()))
        raise ConfigError(f"{path} is {value!r}; it should be {wanted}.") from error


def _known(path: str, table: Table, allowed: list[str]) -> None:
    for key in table:
        if key not in allowed:
            where = f"of {path}" if path else "of a configuration"
            raise ConfigError(unknown("setting", f"{path}.{key}" if path else key, allowed, f"settings {where}"))


def _check_ranks(config: Config, name: str) -> None:
    budgets = config.clients.budgets(config.method.adapter.budget, config.seed)
    if not config.method.any_rank and len(set(budgets)) > 1:
        able = [other for other in methods.names() if methods.load(other).any_rank]
        raise ConfigError(
            f"clients.ranks gives the clients ranks {sorted(set(budgets))}, but {name!r} needs one rank for all; "
            f"set one number, or take {' or '.join(map(repr, able))}."
        )
    if not config.method.any_rank and set(budgets) != {config.method.adapter.budget}:
        raise ConfigError(
            f"clients.ranks is {budgets[0]}, but adapter.rank is {config.method.adapter.budget}; "
            f"{name!r} needs them equal: leave clients.ranks out."
        )


def _resolved(config: Config, table: Table) -> Table:
    """Every setting of the run with its default written out; ``None`` has no TOML form and is left out."""
    adapter = {"name": next(k for k, v in KINDS.items() if type(config.method.adapter) is v)}
    names = {key: {"name": table[key]["name"]} for key in ("task",)} | {"adapter": adapter}
    names["method"] = {"name": table.get("method", {}).get("name", "fedit")}
    found: Table = {"rounds": config.rounds, "seed": config.seed}
    objects = {s: config.method.adapter if s == "adapter" else getattr(config, s) for s in SECTIONS if s != "compare"}
    for section, value in objects.items():
        found[section] = {**names.get(section, {}), **_as_table(value)}
    if config.training.local_epochs is None:
        found["training"]["local_steps"] = config.training.steps(1)
    found["clients"]["split"] = splits.resolved(config.clients.split)
    return found


def _as_table(value: Any) -> Table:
    found = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if item is None or isinstance(item, Adapter):
            continue
        found[f.name] = item
    return found


def dumps(table: Table) -> str:
    """TOML text."""
    return tomli_w.dumps(table)
