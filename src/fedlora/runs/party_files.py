"""Read the settings files of the parties of a federation into one configuration: a rehearsal on one machine.

Each file is the party's own: a whole configuration, or only the settings in which it differs from a main file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedlora.runs.build import OF_SERVER, agreed_settings, per_machine_settings
from fedlora.runs.config import AnyConfig, Config, Overrides, build, to_table
from fedlora.runs.sections import EMBEDDED
from fedlora.schema import (
    ConfigError,
    Table,
    flatten_table,
    get_key,
    merge_tables,
    read_table,
    remove_key,
    set_keys,
)
from fedlora.tasks.data.folders import file_ending
from fedlora.training.device import Engine

DATA = "task.data"
PartySource = str | Path | Mapping[str, Any]  # a party's TOML file, or its table


@dataclass(frozen=True)
class _Source:
    """The settings as one file states them, with its name for messages."""

    name: str
    table: Table
    file: Path | None = None

    @classmethod
    def read(cls, source: AnyConfig, name: str) -> "_Source":
        if not isinstance(source, str | Path):
            return cls(name, to_table(source))
        return cls(str(source), read_table(source), Path(source).expanduser().absolute())

    def expand(self) -> "list[_Source]":
        """Return the sources of a file with ``[[party]]`` tables, as ``fedlora flower local`` reads it, or this one."""
        entries = self.table.get("party")
        if self.table.keys() != {"party"} or not isinstance(entries, list):
            return [_with_paths(self)]
        tables = {entry.get("client", place): entry for place, entry in enumerate(entries) if isinstance(entry, dict)}
        if sorted(tables, key=str) != sorted(range(len(entries)), key=str):
            raise ConfigError(
                f"the parties of {self.name} are clients {list(tables)}; each of 0 to {len(entries) - 1} is needed."
            )
        own = [{k: v for k, v in tables[client].items() if k not in ("client", "state")} for client in sorted(tables)]
        return [_Source(f"{self.name}, party {client}", table) for client, table in enumerate(own)]


def read_parties(
    parties: Sequence[PartySource],
    config: AnyConfig | None = None,
    overrides: Overrides = (),
    note: Callable[[str], None] = lambda text: None,
) -> Config:
    """Return the configuration of a rehearsal: what all parties agreed on, and a ``[[party]]`` table for each.

    Args:
        parties: a TOML file, or a table, for each client, from client 0. Paths in a file are relative to its folder.
        config: the main file, over which each party's settings are laid; without it, every party's file is a whole
            configuration, and the first one's settings of the server are taken.
        overrides: for all parties, as of ``fedlora.run``; a setting of one machine changes the main file's.
        note: called with a sentence for each setting of a party that the rehearsal does not use.

    Raises ``ConfigError`` with the file's name if a file is wrong, if a party names no data, or if a setting that must
    be equal for all parties is not.
    """
    sources = [s for client, party in enumerate(parties) for s in _Source.read(party, f"party {client}").expand()]
    if not sources:
        raise ConfigError("no party is named; name a TOML file for each.")
    main = sources[0] if config is None else _Source.read(config, "the configuration")
    local = _local_settings(main.table)
    shared = _without_keys(overrides, local)
    if config is None:
        _check_overrides(overrides, local)
    table = to_table(main.table, overrides)
    _check_clients(main.name, table, len(sources))
    agreed = _build(main.name, _as_own(table, len(sources)))
    base = to_table(agreed if config is not None else _build(main.name, _without_local_task(to_table(agreed))))
    entries = []
    for source in sources:
        whole = source.table if config is None else merge_tables(table, source.table)
        whole = _drop_engine(source, _as_own(to_table(whole, shared), len(sources)), agreed, main, note)
        own = _build(source.name, whole)
        _check_agreement(source, own, agreed, main)
        _note_server_settings(source, own, agreed, main, note)
        entries.append(_party_table(source, own, base))
    _note_same_data(sources, entries, note)
    return _build(main.name, {**base, "party": entries})


def _build(name: str, table: Table) -> Config:
    try:
        return build(table)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _without_keys(overrides: Overrides, keys: Sequence[str]) -> Overrides:
    """Return the overrides of other keys."""
    if isinstance(overrides, Mapping):
        return {key: value for key, value in overrides.items() if key not in keys}
    return [item for item in overrides if item.partition("=")[0].strip() not in keys]


def _local_settings(table: Table) -> list[str]:
    """Return the per-machine settings; without a task only those of the model and the engine."""
    try:
        return per_machine_settings(table)
    except (ValueError, AttributeError):  # a wrong task, which ``build`` reports
        return []


def _check_overrides(overrides: Overrides, local: Sequence[str]) -> None:
    for key in (key for key in local if not key.startswith("engine.")):
        if len(_without_keys(overrides, [key])) < len(overrides):
            raise ConfigError(f"{key} is a setting that each party has of its own; set it in the party's file.")


def _check_clients(name: str, table: Table, parties: int) -> None:
    if "party" in table:
        raise ConfigError(f"{name} has [[party]] tables of its own; leave out these, or the files of parties.")
    count = get_key(table, "clients.count")
    if isinstance(count, int) and count != parties:
        raise ConfigError(
            f"{name} has clients.count = {count}, but settings of {parties} parties are named; name a file for "
            "each client, or leave clients.count out."
        )
    partition = get_key(table, "clients.partition")
    partition = partition.get("name") if isinstance(partition, Mapping) else partition
    if partition not in (None, "own"):
        raise ConfigError(
            f"{name} has clients.partition = {partition!r}, but every party has its own rows; set it to "
            '{ name = "own" }, or leave it out.'
        )


def _as_own(table: Table, parties: int) -> Table:
    """Return the table for that many clients with their own data, where it does not say so."""
    return merge_tables({"clients": {"count": parties, "partition": {"name": "own"}}}, table)


def _with_paths(source: _Source) -> _Source:
    """Return a file's settings with absolute paths: they are relative to its folder, unless they are ids of a hub."""
    table = source.table
    for key in (DATA, "model.name"):
        value = get_key(table, key)
        if source.file is None or not isinstance(value, str) or value in EMBEDDED:
            continue
        path = source.file.parent / Path(value).expanduser()
        is_path = value.startswith((".", "/", "~")) or file_ending(value) is not None
        if path.exists() or is_path or Path(value).exists():  # never another folder's file of the same name
            table = set_keys(table, {key: str(path.parent.resolve() / path.name)})
    return replace(source, table=table)


def _drop_engine(source: _Source, table: Table, agreed: Config, main: _Source, note: Callable[[str], None]) -> Table:
    """Return a party's table with the main file's settings of the machine on which the rehearsal runs."""
    for key in (f"engine.{f.name}" for f in fields(Engine)):
        value, used = get_key(table, key), get_key(agreed.table, key)
        if value is not None and value != used:
            note(f"{source.name} sets {key} = {value!r}; a rehearsal runs on one machine, with that of {main.name}.")
            table = remove_key(table, key.split("."))
    return table


def _note_server_settings(
    source: _Source, own: Config, agreed: Config, main: _Source, note: Callable[[str], None]
) -> None:
    theirs, ours = ({**c.table, "compare": c.compare} for c in (own, agreed))
    for section in OF_SERVER:
        if theirs.get(section) != ours.get(section):
            note(f"{source.name} has its own [{section}], which only the server reads; that of {main.name} is used.")


def _party_table(source: _Source, own: Config, base: Table) -> Table:
    """Return the ``[[party]]`` table of one party: its settings that differ from ``base``, and its data."""
    local = [key for key in per_machine_settings(own.table) if not key.startswith("engine.")]
    if DATA in local and get_key(source.table, DATA) is None:
        raise ConfigError(f"{source.name} names no data, and each party has its own; set {DATA} in it.")
    values = {key: x for key in local if (x := get_key(own.table, key)) is not None and x != get_key(base, key)}
    entry = set_keys({}, {**values, **({DATA: get_key(own.table, DATA)} if DATA in local else {})})
    return {**({} if source.file is None else {"file": str(source.file)}), **entry}


def _check_agreement(source: _Source, own: Config, agreed: Config, main: _Source) -> None:
    """Raise ``ConfigError`` for the first setting that is not equal for all, with both values and both files."""
    theirs, ours = (flatten_table({**agreed_settings(c.table), "training": c.table["training"]}) for c in (own, agreed))
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key) and {} not in (ours.get(key), theirs.get(key)):  # an empty table
            values = [repr(flat[key]) if key in flat else "not set" for flat in (ours, theirs)]
            raise ConfigError(
                f"{key} is {values[0]} in {main.name} and {values[1]} in {source.name}; all parties need one value: "
                "agree on it, and set it in both."
            )


def _without_local_task(table: Table) -> Table:
    """Return the table without its own reading of data: the parties state theirs, and the server has none."""
    for key in per_machine_settings(table):
        if key == DATA:
            table = set_keys(table, {key: "own"})
        elif key.startswith("task."):
            table = remove_key(table, key.split("."))
    return table


def _note_same_data(sources: Sequence[_Source], entries: Sequence[Table], note: Callable[[str], None]) -> None:
    seen: dict[str, str] = {}
    for source, entry in zip(sources, entries, strict=True):
        rows = str([get_key(entry, f"task.{key}") for key in ("data", "data_config", "train_split")])
        if rows in seen:
            note(f"{seen[rows]} and {source.name} name the same data, {get_key(entry, DATA)!r}.")
        seen.setdefault(rows, source.name)
