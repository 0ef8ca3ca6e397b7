"""TOML in, frozen dataclasses out: the only place that turns a name into a class.

Each table holds the keyword arguments of one constructor, so the dataclasses are the schema and there is no second
list. What is wrong is said in one sentence with the key, the value, and what would do.
"""

import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedlora import methods, splits, tasks
from fedlora.adapters import KINDS, Adapter, Dense
from fedlora.clients import Clients, Shard
from fedlora.engines.flower.settings import Network
from fedlora.engines.loop import Federation
from fedlora.evaluation import Evaluation
from fedlora.flower.own import OWN
from fedlora.method import Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.local import Local
from fedlora.model import Model, Precision
from fedlora.nearest import unknown
from fedlora.optimizers import ServerOptimizer
from fedlora.runtime import Engine, checkpoint_activations
from fedlora.settings import ConfigError, Table, construct, dumps, known, merged, overridden, read_table, typed
from fedlora.start import begin
from fedlora.tasks.networks import quantised
from fedlora.tasks.task import Data, Task
from fedlora.training import Training

__all__ = [
    "Config", "ConfigError", "ModelTable", "Table", "build", "construct", "dumps", "merged", "overridden", "read",
    "read_table",
]  # fmt: skip


@dataclass(frozen=True)
class ModelTable:
    """The ``[model]`` table."""

    name: str  # a hub id or a local folder
    targets: list[str] | None = None  # modules to adapt; None: the family's query and value projections
    head: list[str] | None = None  # modules trained in full; None: what the task put on top
    start: str | None = None  # a PEFT adapter folder, held by every party, that adapters and head begin with
    quantize: Literal["4bit", "8bit"] | None = None  # hold the base in so many bits, on a GPU, through bitsandbytes
    overlay: bool | None = None  # keep folds beside the base weights; None: where these are multiplied in bfloat16


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

    def federation(self, party: int | None = None, combines: bool = False) -> Federation:
        """Loads the model and the data, and builds what an engine runs.

        ``party`` is the client that this machine is, and ``combines`` says that no client trains here; both matter
        only where every party has data of its own (``clients.split``).
        """
        device = self.engine.prepare()
        data, shards = self.rows(party, combines)
        names = tuple(self._label_names()) if data is None else data.label_names
        network = self.network(len(names), device)
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
            training, self.evaluation, self.server, self.rounds, self.seed, names, fingerprint(self.table),
        )  # fmt: skip

    def network(self, labels: int, device: torch.device) -> nn.Module:
        """The pretrained network, quantised where ``model.quantize`` says so."""
        kind = self.model.quantize
        loading = {} if kind is None else {"loading": quantised(kind, device)}
        return self.task.network(self.model.name, labels, self.seed, **loading)

    def rows(self, party: int | None, combines: bool) -> tuple[Data | None, Mapping[int, Shard] | Sequence[Shard]]:
        """The data of this machine and each client's rows in it; see ``federation``."""
        if not self.clients.own_data:
            data = self.task.load(self.model.name, self.seed, self.clients.client_column)
            return data, self.clients.shards(data, self.seed)
        self._label_names()
        if party is None and not combines:
            raise ConfigError(
                "clients.split is 'own': every party has its own data on its own machine; run it with "
                "`fedlora flower`, or set clients.split to a way to split one data set."
            )
        if party is None:
            return None, {}
        data = self.task.load(self.model.name, self.seed)
        return data, {party: Shard(torch.arange(len(data.train)), torch.arange(len(data.test)))}

    def _label_names(self) -> Sequence[str]:
        names = self.task.agreed()
        if names is None:
            raise ConfigError(
                "clients.split is 'own', so the labels must be agreed beforehand; set task.label_names to all of them."
            )
        return names

    def attached(self, network: nn.Module, precision: Precision = "float32", device: Any = "cpu") -> Model:
        """The network with this configuration's adapters."""
        table = self.model
        return Model.attach(network, self.method.adapter, table.targets, table.head, precision, device, table.overlay)

    def head_rule(self, dense: Dense) -> Method:
        """How a part trained in full is combined: with the method's own weights, or not at all."""
        return (FedIT if self.method.shares_head else Local)(dense, self.method.weighting)


def fingerprint(table: Table) -> str:
    """A digest of all that parties must have alike: the configuration without what a node says of its own machine."""
    own = {*OWN, "training.precision"}  # a machine's precision is what it is fast at
    left = {
        section: {k: v for k, v in value.items() if f"{section}.{k}" not in own} if isinstance(value, dict) else value
        for section, value in table.items()
        if section not in ("engine", "compare")
    }
    return hashlib.blake2b(json.dumps(left, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


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
        "task": _named("task", _section(table, "task"), tasks.load),
        "method": method,
        "clients": construct(Clients, "clients", _section(table, "clients")),
        "training": construct(Training, "training", _section(table, "training")),
        "evaluation": construct(Evaluation, "evaluation", _section(table, "evaluation")),
        "server": construct(ServerOptimizer, "server", _section(table, "server")),
        "engine": construct(Engine, "engine", _section(table, "engine")),
        "flower": construct(Network, "flower", _section(table, "flower")),
    }
    _check_quantised(parts["model"], parts["task"], table["task"]["name"])
    parts["server"].check(method)
    able = [name for name in methods.names() if methods.load(name).sums]
    for size in parts["clients"].staying_sizes:
        parts["flower"].check(method, size, able)
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
