"""Configurations: from TOML to frozen dataclasses.

A table has the keyword arguments of one constructor, so the dataclasses in ``sections.SECTIONS`` are the schema. An
error is one sentence with the key, the value and a remedy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.adapters import Adapter
from fedlora.engines.federation import Federation
from fedlora.methods._base import Method
from fedlora.registry import Registry, unknown
from fedlora.runs.build import build_federation, per_machine_settings
from fedlora.runs.compatibility import check_adapter, check_compatibility
from fedlora.runs.parties import build_rehearsal
from fedlora.runs.sections import OPTIONAL, SECTIONS, Party, Sections
from fedlora.runs.trackers import Track, Tracker
from fedlora.schema import (
    ConfigError,
    Table,
    apply_overrides,
    check_keys,
    check_type,
    construct,
    construct_by_name,
    load_class,
    merge_tables,
    read_table,
    set_keys,
)
from fedlora.tasks._base import Task
from fedlora.training.peft_settings import OFF

REQUIRED = {  # section -> an example
    "model": '[model] name = "roberta-base"',
    "task": '[task] name = "text-classification", data = "my-folder"',
}
DEFAULT_NAMES = {"adapter": "lora", "method": "fedit"}


@dataclass(frozen=True)
class Config(Sections):
    """The configuration of a run: the objects of all sections. ``fedlora.read`` makes it from TOML.

    It is checked when it is built, also by ``dataclasses.replace``: names and types as in TOML, and settings that
    exclude each other. A ``Config`` of objects and one of a TOML file with the same settings are equal: their runs have
    the same bits. ``table`` is its TOML with all defaults, and ``compare`` are the settings of single methods in a
    comparison, by label.

        config = fedlora.Config(
            model=fedlora.ModelTable("demo-vit"),
            task=fedlora.tasks.load("image-classification")(data="digits"),
            method=fedlora.methods.load("fedsa-lora")(fedlora.LoRA(rank=4, alpha=8)),
            training=fedlora.Training(local_steps=5, learning_rate=5e-3),
        )

    Raises ``ConfigError`` if settings exclude each other or have wrong types.
    """

    def __post_init__(self):
        object.__setattr__(self, "table", _to_table(self))
        check_compatibility(self)

    def federation(self, client: int | None = None, combines: bool = False) -> Federation:
        """Load the model and the data, and build the federation; see ``build_federation`` and ``build_rehearsal``."""
        if not self.party or combines or client is not None:
            return build_federation(self, client, combines)
        return build_rehearsal(self, [self._of_party(client) for client in range(len(self.party))])

    def _of_party(self, client: int) -> Sections:
        """Return the configuration of one party alone. Raises ``ConfigError`` with the party's file."""
        party, table = self.party[client], {key: value for key, value in self.table.items() if key != "party"}
        try:
            return build(merge_tables(table, {"task": party.task, "model": party.model}))
        except ValueError as error:
            raise ConfigError(f"{party.title(client)}: {error}") from error


AnyConfig = str | Path | Mapping[str, Any] | Config  # a TOML file, its table, or the objects
Overrides = Sequence[str] | Mapping[str, Any]  # "key=value", or values by key; keys are dotted


def to_config(config: AnyConfig, overrides: Overrides = ()) -> Config:
    """Return the configuration of a TOML file, a table or objects, with some settings replaced.

    ``overrides`` are ``"key=value"`` as on the command line, or a mapping, e.g. ``{"training.batch_size": 8}``. A task
    keeps the Python objects that it has. Raises ``ConfigError``.
    """
    if isinstance(config, Config) and not overrides:
        return config
    changed = build(to_table(config, overrides))
    return keep_objects(changed, config.task) if isinstance(config, Config) else changed


def keep_objects(config: Config, task: Task) -> Config:
    """Return the configuration with the Python objects of ``task``, if that is a task of the same kind with some."""
    if type(config.task) is not type(task):
        return config
    objects = {f.name: getattr(task, f.name) for f in fields(task) if f.init and f.name.startswith("_")}  # type: ignore[arg-type]
    return replace(config, task=replace(config.task, **objects)) if objects else config  # type: ignore[type-var]


def to_table(config: AnyConfig, overrides: Overrides = ()) -> Table:
    """Return the TOML table of a file, a table or objects, with some settings replaced; it has no checks of its own.

    The table of a ``Config`` is one that more settings can be laid over: a budget that was not set is not in it.
    """
    if isinstance(config, str | Path):
        table = read_table(config)
    elif isinstance(config, Config):
        table = _to_source(config)
    elif isinstance(config, Mapping):
        table = dict(config)
    else:
        raise ConfigError(
            f"the configuration is {config!r}; it should be the path of a .toml file, a dict or a fedlora.Config."
        )
    _check_overrides(overrides)
    return set_keys(table, overrides) if isinstance(overrides, Mapping) else apply_overrides(table, overrides)


def _check_overrides(overrides: Any) -> None:
    """Raise ``ConfigError`` unless the overrides have one of their forms."""
    is_listed = isinstance(overrides, Mapping | list | tuple)
    if not is_listed or not all(isinstance(item, str) for item in overrides):
        example = overrides if isinstance(overrides, str) else "rounds=5"
        raise ConfigError(f"overrides is {overrides!r}; it is a list, e.g. [{example!r}], or a dict by dotted keys.")


def _to_source(config: Config) -> Table:
    """Return the table of a configuration without derived settings, and with those that ``config.table`` leaves out."""
    privacy = {f.name: x for f in fields(config.privacy) if (x := getattr(config.privacy, f.name)) is not None}
    table = {**config.table, "training": dict(config.table["training"]), "privacy": privacy}
    if config.training.local_steps is None:
        table["training"].pop("local_steps", None)
    if config.method.adapter == default_adapter(type(config.method)):  # another method has another default
        del table["adapter"]
    return {**table, **({"compare": dict(config.compare)} if config.compare else {})}


def read(path: str | Path, overrides: Overrides = ()) -> Config:
    """Read a TOML file. ``overrides`` are ``key=value``, with dotted keys and TOML values, or a dict.

        config = fedlora.read("mine.toml", ["training.local_steps=2"])
        config.training.local_steps  # 2

    Raises ``ConfigError``.
    """
    return build(to_table(path, overrides))


def build(table: Table) -> Config:
    """Check a table and build its objects.

        task = {"name": "image-classification", "data": "digits"}
        config = fedlora.build({"model": {"name": "demo-vit"}, "task": task, "rounds": 3})
        config.method.title  # 'FedIT'

    Raises ``ConfigError``.
    """
    check_keys("", table, ["rounds", "seed", *SECTIONS, "track", "compare", "party"])
    for section, example in REQUIRED.items():
        if section not in table:
            raise ConfigError(f"the configuration has no [{section}] table; it needs one, e.g. {example}.")
    _check_peft(table)
    values: dict[str, Any] = {key: check_type(key, table[key], int) for key in ("rounds", "seed") if key in table}
    for section in SECTIONS:
        if section in table or section not in OPTIONAL:
            values[section] = _build_section(section, section_table(table, section), values)
    values.pop("adapter", None)
    values["compare"] = table.get("compare", {})
    values["track"] = Track.from_table(section_table(table, "track"))
    values["party"] = _build_parties(table)
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


def _build_parties(table: Table) -> tuple[Party, ...]:
    """Build the ``[[party]]`` tables. Raises ``ConfigError`` for a setting that must be equal for all parties."""
    entries = check_type("party", table.get("party", []), list[dict[str, Any]])
    parties = tuple(construct(Party, f"party[{client}]", entry) for client, entry in enumerate(entries))
    allowed = [key for key in per_machine_settings(table) if not key.startswith("engine.")] if parties else []
    for client, party in enumerate(parties):
        for key in [*(f"task.{k}" for k in party.task), *(f"model.{k}" for k in party.model)]:
            if key not in allowed:
                reason = unknown("setting", key, allowed, "settings that a party may have of its own")
                raise ConfigError(f"{party.title(client)}: {reason}")
    return parties


def section_table(table: Table, section: str) -> Table:
    """Return the settings of a section; an adapter or a method without a name has the default one."""
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


def default_adapter(method: type[Method]) -> Adapter | None:
    """Return the adapter of a method that is given none; None if it needs one."""
    own = next(f for f in fields(method) if f.name == "adapter")
    default: Any = own.default_factory() if own.default_factory is not MISSING else own.default
    return None if default is MISSING else default


def _to_table(config: Config) -> Table:
    """Return the TOML of a configuration with all defaults. ``None`` has no TOML form and is left out.

    Numbers get the types of the settings, as TOML's do: 1 for a float becomes 1.0. Raises ``ConfigError`` for an object
    or a value that TOML could not have made.
    """
    table: Table = {key: check_type(key, getattr(config, key), int) for key in ("rounds", "seed")}
    for section, kind in SECTIONS.items():
        value = getattr(config.method if section == "adapter" else config, section, None)
        if value is None and section in OPTIONAL:
            continue
        base = kind.base if isinstance(kind, Registry) else kind
        if not is_dataclass(value) or not isinstance(value, base):
            raise ConfigError(
                f"{section} is {value!r}; it should be an object of its settings, a {base.__name__}, as fedlora.read "
                "makes it."
            )
        names = {"name": kind.name_of(type(value))} if isinstance(kind, Registry) else {}
        table[section] = names | _check_settings(config, section, value)
    check_compare(config.compare)
    if trackers := _check_track(config.track).to_table():
        table["track"] = trackers
    if parties := _check_parties(config, table):
        table["party"] = parties
    if not config.privacy.on:
        del table["privacy"]
    if config.training.local_epochs is None:
        table["training"]["local_steps"] = config.training.steps(1)
    partition = {"name": config.clients.partition_table["name"], **asdict(config.clients.partitioner)}
    table["clients"]["partition"] = partition
    return table


def _check_settings(config: Config, section: str, value: Any) -> Table:
    """Return the settings of a section. In ``config`` they get the types that TOML's would have."""
    ready = {"adapter": config.method.adapter} if section == "method" else {}
    given = list_settings(value)
    settings = list_settings(construct(type(value), section, given, skip=tuple(ready), **ready))
    if repr({key: settings[key] for key in given}) != repr(given):  # 1 == 1.0, but they are written differently
        value = replace(value, **settings)
        section, value = ("method", replace(config.method, adapter=value)) if section == "adapter" else (section, value)
        object.__setattr__(config, section, value)
    return settings


def list_settings(value: Any) -> Table:
    """Return the settings of a section's object that are set."""
    settings = {f.name: getattr(value, f.name) for f in fields(value) if not f.name.startswith("_")}
    return {key: x for key, x in settings.items() if x is not None and not isinstance(x, Adapter)}


def _check_parties(config: Config, table: Table) -> list[Table]:
    """Return the ``[[party]]`` tables. Raises ``ConfigError`` unless they are parties that TOML could have made."""
    if not isinstance(config.party, tuple) or not all(isinstance(party, Party) for party in config.party):
        raise ConfigError(f"party is {config.party!r}; it should be a tuple of Party, as fedlora.read makes it.")
    parties = [{key: value for key, value in vars(party).items() if value} for party in config.party]
    _build_parties({**table, "party": parties})
    return parties


def _check_track(track: Any) -> Track:
    """Return ``[track]``. Raises ``ConfigError`` unless it is trackers by name."""
    trackers = track.trackers if isinstance(track, Track) else None
    if not isinstance(trackers, Mapping) or not all(isinstance(x, Tracker) for x in trackers.values()):
        raise ConfigError(f"track is {track!r}; it should be a Track of trackers by name, as fedlora.read makes it.")
    Track.from_table(track.to_table())
    return track


def check_compare(labels: Any) -> None:
    """Raise ``ConfigError`` unless ``[compare]`` has a table for each label."""
    for key, value in (labels if isinstance(labels, Mapping) else {"": labels}).items():
        if not isinstance(value, Mapping):
            place = f"compare.{key}".rstrip(".")
            raise ConfigError(f"{place} is {value!r}; it is a table of settings, e.g. [compare.fedit].")
