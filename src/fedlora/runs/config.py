"""Configurations: from TOML to frozen dataclasses.

A table has the keyword arguments of one constructor, so the dataclasses in ``sections.SECTIONS`` are the schema. An
error is one sentence with the key, the value and a remedy.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from fedlora.adapters import Adapter
from fedlora.engines.federation import Federation
from fedlora.registry import Registry
from fedlora.runs.build import build_federation
from fedlora.runs.compatibility import check_adapter, check_compatibility
from fedlora.runs.sections import OPTIONAL, SECTIONS, Sections
from fedlora.runs.trackers import Track
from fedlora.schema import (
    ConfigError,
    Table,
    apply_overrides,
    check_keys,
    check_type,
    construct,
    construct_by_name,
    load_class,
    read_table,
)
from fedlora.training.peft_settings import OFF

REQUIRED = {  # section -> an example
    "model": '[model] name = "roberta-base"',
    "task": '[task] name = "text-classification", data = "my-folder"',
}
DEFAULT_NAMES = {"adapter": "lora", "method": "fedit"}


@dataclass(frozen=True)
class Config(Sections):
    """The configuration of a run. It is checked when it is built, also by ``dataclasses.replace``.

    Raises ``ValueError`` if settings exclude each other or have wrong types.
    """

    def __post_init__(self):
        object.__setattr__(self, "table", _to_table(self))
        check_compatibility(self)

    def federation(self, client: int | None = None, combines: bool = False) -> Federation:
        """Load the model and the data, and build the federation; see ``build_federation``."""
        return build_federation(self, client, combines)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file. ``overrides`` are ``key=value``, with dotted keys and TOML values."""
    return build(apply_overrides(read_table(path), overrides))


def build(table: Table) -> Config:
    """Check a table and build its objects. Raises ``ConfigError``."""
    check_keys("", table, ["rounds", "seed", *SECTIONS, "track", "compare"])
    for section, example in REQUIRED.items():
        if section not in table:
            raise ConfigError(f"the configuration has no [{section}] table; it needs one, e.g. {example}.")
    _check_peft(table)
    values: dict[str, Any] = {key: check_type(key, table[key], int) for key in ("rounds", "seed") if key in table}
    for section in SECTIONS:
        if section in table or section not in OPTIONAL:
            values[section] = _build_section(section, _section_table(table, section), values)
    values.pop("adapter", None)
    values["track"] = Track.from_table(_section_table(table, "track"))
    try:
        return Config(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_peft(table: Table) -> None:
    """Raise ``ConfigError`` for settings of PEFT that this library does not support, with the reason."""
    for section in ("model", "adapter"):
        settings = table.get(section)
        for key in (key for key in OFF if isinstance(settings, dict) and key in settings):
            raise ConfigError(
                f"{section}.{key} is a setting of PEFT that cannot be used here: {OFF[key]}; leave it out, and name "
                "linear layers in model.targets."
            )


def _section_table(table: Table, section: str) -> Table:
    settings = table.get(section, {})
    if not isinstance(settings, dict):
        raise ConfigError(f"{section} is {settings!r}; it is a table, e.g. [{section}].")
    return {"name": DEFAULT_NAMES[section], **settings} if section in DEFAULT_NAMES else settings


def _build_section(section: str, settings: Table, values: Table) -> Any:
    """Build the object of one section; ``values`` has those of the sections before it."""
    kind = SECTIONS[section]
    if not isinstance(kind, Registry):
        return construct(kind, section, settings)
    if section != "method" or not isinstance(settings["name"], str):
        return construct_by_name(kind, section, settings)
    name = settings.pop("name")
    method = load_class(kind, name)
    ready = {"adapter": values["adapter"]} if "adapter" in values else {}
    if ready:
        check_adapter(method, name, values["adapter"])
    return construct(method, section, settings, skip=("adapter",), **ready)


def _to_table(config: Sections) -> Table:
    """Return the TOML of a configuration with all defaults. ``None`` has no TOML form and is left out.

    Raises ``ConfigError`` for an object or a value that TOML could not have made.
    """
    table: Table = {key: check_type(key, getattr(config, key), int) for key in ("rounds", "seed")}
    for section, kind in SECTIONS.items():
        value = getattr(config.method if section == "adapter" else config, section, None)
        if value is None and section in OPTIONAL:
            continue
        if not is_dataclass(value) or isinstance(value, type):
            raise ConfigError(
                f"{section} is {value!r}; it should be an object of its settings, as fedlora.read makes it."
            )
        settings = {f.name: getattr(value, f.name) for f in fields(value) if not f.name.startswith("_")}
        settings = {key: x for key, x in settings.items() if x is not None and not isinstance(x, Adapter)}
        ready = {"adapter": config.method.adapter} if section == "method" else {}
        construct(type(value), section, settings, skip=tuple(ready), **ready)
        names = {"name": kind.name_of(type(value))} if isinstance(kind, Registry) else {}
        table[section] = names | settings
    if config.track.trackers:
        table["track"] = config.track.to_table()
    if not config.privacy.on:
        del table["privacy"]
    if config.training.local_epochs is None:
        table["training"]["local_steps"] = config.training.steps(1)
    partition = {"name": config.clients.partition["name"], **asdict(config.clients.partitioner)}
    table["clients"]["partition"] = partition
    return table
