"""TOML in, frozen dataclasses out: the only place that turns a name into a class.

Each table holds the keyword arguments of one constructor, so the dataclasses are the schema and there is no second
list. What is wrong is said in one sentence with the key, the value, and what would do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapters import ADAPTERS, Adapter
from fedlora.engines.checkpoint import CheckpointSettings
from fedlora.engines.clients import Clients
from fedlora.engines.comm.compression import Compression
from fedlora.engines.federation import Federation
from fedlora.engines.network_settings import Network
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.registry import Registry
from fedlora.runs import compatibility, trackers
from fedlora.runs.build import build_federation
from fedlora.runs.compatibility import SECTIONS, check_adapter
from fedlora.runs.sections import ModelTable, Sections
from fedlora.schema import (
    ConfigError,
    Table,
    apply_overrides,
    check_keys,
    check_type,
    construct,
    construct_by_name,
    dumps,
    load_class,
    merge_tables,
    read_table,
)
from fedlora.security.attacks import ATTACKS
from fedlora.security.privacy import Privacy
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.validation import Validation
from fedlora.tasks import TASKS
from fedlora.training.device import Engine
from fedlora.training.evaluation import Evaluation
from fedlora.training.local import Training
from fedlora.training.peft_settings import OFF

__all__ = [
    "Config", "ConfigError", "ModelTable", "Table", "apply_overrides", "build", "construct", "dumps", "merge_tables",
    "read", "read_table",
]  # fmt: skip


@dataclass(frozen=True)
class Config(Sections):
    """A whole run, checked, also where it was put together or changed (``dataclasses.replace``) in Python.

    ``table`` is the resolved TOML, every default written out: enough to repeat the run. Raises ``ValueError`` where
    settings exclude each other or are of a wrong kind.
    """

    def __post_init__(self):
        object.__setattr__(self, "table", compatibility.resolve(self))
        compatibility.check(self)

    def federation(self, party: int | None = None, combines: bool = False) -> Federation:
        """Load the model and the data, and build the federation that an engine runs; see ``build_federation``."""
        return build_federation(self, party, combines)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A config from a TOML file; ``overrides`` are ``key=value`` with dotted keys and TOML values."""
    return build(apply_overrides(read_table(path), overrides))


def build(table: Table) -> Config:
    """Checks a table and builds its objects. ``ConfigError`` says what is wrong with it."""
    top = {"rounds": int, "seed": int}
    check_keys("", table, [*top, *SECTIONS, "track", "compare"])
    for section in ("model", "task"):
        if section not in table:
            raise ConfigError(f"the configuration has no [{section}] table; it needs one, e.g. {EXAMPLES[section]}.")
    _check_peft(table)
    numbers = {key: check_type(key, table[key], kind) for key, kind in top.items() if key in table}
    parts = {
        "model": construct(ModelTable, "model", _section(table, "model")),
        "task": construct_by_name(TASKS, "task", _section(table, "task")),
        "method": _method(_section(table, "method", {"name": "fedit"}), table.get("adapter")),
        "clients": construct(Clients, "clients", _section(table, "clients")),
        "training": construct(Training, "training", _section(table, "training")),
        "evaluation": construct(Evaluation, "evaluation", _section(table, "evaluation")),
        "server": construct(ServerOptimizer, "server", _section(table, "server")),
        "privacy": construct(Privacy, "privacy", _section(table, "privacy")),
        "engine": construct(Engine, "engine", _section(table, "engine")),
        "flower": construct(Network, "flower", _section(table, "flower")),
        "validation": construct(Validation, "validation", _section(table, "validation")),
        "robust": _optional(ROBUST_RULES, "robust", table),
        "attack": _optional(ATTACKS, "attack", table),
        "compression": construct(Compression, "compression", _section(table, "compression")),
        "checkpoint": construct(CheckpointSettings, "checkpoint", _section(table, "checkpoint")),
        "track": trackers.read(_section(table, "track")),
    }
    try:
        return Config(**parts, **numbers)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_peft(table: Table) -> None:
    """``ConfigError`` where an adapter is asked for that PEFT has and this library has not, with the reason."""
    for section in ("model", "adapter"):
        found = table.get(section)
        for key in (key for key in OFF if isinstance(found, dict) and key in found):
            raise ConfigError(
                f"{section}.{key} is a setting of PEFT that cannot be used here: {OFF[key]}; leave it out, and name "
                "linear layers in model.targets."
            )


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
    kind = load_class(METHODS, name)
    adapter = _adapter(adapter_table) if adapter_table is not None else None
    if adapter is not None:
        check_adapter(kind, name, adapter)
    values = {k: v for k, v in table.items() if k != "name"}
    extra = {"adapter": adapter} if adapter is not None else {}
    return construct(kind, "method", values, skip=("adapter",), **extra)


def _adapter(table: Any) -> Adapter:
    if not isinstance(table, dict):
        raise ConfigError(f'adapter is {table!r}; it is a table, e.g. adapter = {{ name = "lora", rank = 8 }}.')
    return construct_by_name(ADAPTERS, "adapter", {"name": "lora", **table})


def _optional(registry: Registry, section: str, table: Table) -> Any:
    """The plug-in of a table that may be left out."""
    return construct_by_name(registry, section, _section(table, section)) if section in table else None
