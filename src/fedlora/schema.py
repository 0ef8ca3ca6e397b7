"""TOML tables: reading, merging, and conversion to dataclasses, whose fields are the schema."""

import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import TypeAdapter, ValidationError

from fedlora.registry import Registry, unknown

Table = dict[str, Any]
T = TypeVar("T")
PER_MACHINE = "per machine"
PerMachine = Annotated[T, PER_MACHINE]  # the type of a setting in which the machines of one federation may differ
PLAIN = ("model", "engine")  # tables whose name is an ordinary value; in other tables it determines the keys


class ConfigError(ValueError):
    """An error in a configuration; its text is one sentence."""


def read_table(path: str | Path) -> Table:
    """Return the table of a TOML file."""
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {str(path)!r}; name a .toml file.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{str(path)!r} is a folder; name a .toml file in it.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}.") from error


def apply_overrides(table: Table, overrides: Sequence[str]) -> Table:
    """Return the table with overrides ``a.b=value``; a value that is no TOML is a string."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"the override {item!r} has no '='; write it as key=value, e.g. rounds=5.")
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = text
        table = merge_tables(table, _nest(key.strip().split("."), value))
    return table


def merge_tables(table: Mapping[str, Any], other: Mapping[str, Any], plain: bool = False) -> Table:
    """Return ``table`` updated by ``other``, recursively; another ``name`` replaces a table that is not ``plain``."""
    result = {} if _has_other_name(other, table, plain) else dict(table)
    for key, value in other.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge_tables(old, value, key in PLAIN)
        result[key] = value
    return result


def _has_other_name(table: Mapping[str, Any], base: Mapping[str, Any], plain: bool) -> bool:
    """Whether the names of two tables differ, so that their keys have different meanings."""
    return not plain and table.get("name", base.get("name")) != base.get("name")


def set_keys(table: Table, values: Mapping[str, Any]) -> Table:
    """Return the table with these values at dotted keys."""
    for key, value in values.items():
        table = merge_tables(table, _nest(key.split("."), value))
    return table


def get_key(table: Table, key: str) -> Any:
    """Return the value at a dotted key, or None."""
    value: Any = table
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def remove_key(table: Table, keys: Sequence[str]) -> Table:
    """Return the table without the value at a path of keys."""
    if keys[0] not in table:
        return table
    if len(keys) == 1:
        return {key: value for key, value in table.items() if key != keys[0]}
    return {**table, keys[0]: remove_key(table[keys[0]], keys[1:])}


def table_difference(table: Mapping[str, Any], base: Mapping[str, Any], plain: bool = False) -> Table:
    """Return the smallest table that ``merge_tables`` merges with ``base`` to get ``table``."""
    if _has_other_name(table, base, plain):
        return dict(table)
    result: Table = {}
    for key, value in table.items():
        old = base.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = table_difference(value, old, key in PLAIN)
            result |= {key: inner} if inner else {}
        elif key not in base or old != value:
            result[key] = value
    return result


def flatten_table(table: Mapping[str, Any], prefix: str = "") -> Table:
    """Return a nested table with dotted keys, such as ``training.learning_rate``."""
    flat: Table = {}
    for key, value in table.items():
        is_table = isinstance(value, Mapping) and value
        flat |= flatten_table(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}": value}
    return flat


def _nest(keys: list[str], value: Any) -> Table:
    return {keys[0]: value if len(keys) == 1 else _nest(keys[1:], value)}


def construct(cls: Any, path: str, table: Table, skip: tuple[str, ...] = (), **ready: Any) -> Any:
    """Return an instance of a dataclass from a table. Raises ``ConfigError`` for wrong or missing keys, and types."""
    settable = [f for f in fields(cls) if f.init and f.name not in skip and not f.name.startswith("_")]
    check_keys(path, table, [f.name for f in settable])
    missing = [f.name for f in settable if f.default is f.default_factory is MISSING and f.name not in table]
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing; {cls.__name__} needs it.")
    hints = typing.get_type_hints(cls)
    values = {key: check_type(f"{path}.{key}", value, hints[key]) for key, value in table.items()}
    try:
        return cls(**values, **ready)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def per_machine_fields(cls: type) -> list[str]:
    """Return the names of a dataclass's fields that are ``PerMachine``."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [f.name for f in fields(cls) if PER_MACHINE in getattr(hints[f.name], "__metadata__", ())]


def load_class(registry: Registry[T], name: str) -> type[T]:
    """Return ``registry.load(name)``. Its ``ValueError`` becomes a ``ConfigError``."""
    try:
        return registry.load(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def construct_by_name(registry: Registry[T], path: str, table: Mapping[str, Any]) -> T:
    """Return an instance of the class that a table names, with the table's other keys as settings."""
    name = table.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"[{path}] has no name; set {path}.name to a string.")
    instance: T = construct(
        load_class(registry, name), path, {key: value for key, value in table.items() if key != "name"}
    )
    return instance


def check_type(path: str, value: Any, kind: Any) -> Any:
    """Return the value as a type, checked strictly: ``"8"`` is no int, 8 is a float. Raises ``ConfigError``."""
    if isinstance(value, float) and value != value:
        raise ConfigError(f"{path} is nan; it should be a number.")
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors()))
        raise ConfigError(f"{path} is {value!r}; it should be {wanted}.") from error


def check_keys(path: str, table: Table, allowed: list[str]) -> None:
    """Raise ``ConfigError`` if the table has a key that is not allowed."""
    for key in table:
        if key not in allowed:
            if not allowed:
                raise ConfigError(f"there is no setting '{path}.{key}'; {path} has none beside its name.")
            where = f"of {path}" if path else "of a configuration"
            raise ConfigError(unknown("setting", f"{path}.{key}" if path else key, allowed, f"settings {where}"))


def dumps(table: Table) -> str:
    """Return the table as TOML text."""
    return tomli_w.dumps(table)


def strip_folders(value: Any) -> Any:
    """Return a value with each absolute path replaced by its last part, for publication."""
    if isinstance(value, Mapping):
        return {key: strip_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strip_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() and Path(value).name else value
