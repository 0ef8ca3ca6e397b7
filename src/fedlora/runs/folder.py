"""A run's folder: the names of its files, and how a run takes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.engines.checkpoint import PLACES
from fedlora.files import write
from fedlora.runs.interrupt import FULL
from fedlora.runs.recorder import METRICS
from fedlora.schema import ConfigError, Table

SUMMARY, CONFIG = "summary.json", "config.toml"
EMBEDDED = ("digits", "demo-vit")  # names of data and models that ship with the library


def with_absolute_paths(table: Mapping[str, Any]) -> Table:
    """The table with local files and folders by their absolute paths, so that it means the same from any folder."""
    found: Table = dict(table)
    for section, key in (place.split(".") for place in PLACES):
        value = found.get(section, {}).get(key)
        if isinstance(value, str) and value not in EMBEDDED and (path := Path(value).expanduser()).exists():
            found[section] = {**found[section], key: str(path.absolute())}
    return found


def claim(folder: Path, again: bool) -> None:
    """Makes it a folder to write into, or says in one sentence why not."""
    if not again and ((folder / CONFIG).exists() or (folder / SUMMARY).exists()):
        raise ConfigError(
            f"{str(folder)!r} holds a run already; `fedlora resume {folder}` goes on with it, or choose another "
            "folder with --out."
        )
    try:
        if not (folder / METRICS).exists():
            write(folder / METRICS, b"")
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder.") from error


def release(folder: Path | None) -> None:
    """Takes back what ``claim`` made, where the run could not begin."""
    if folder is not None and not (folder / CONFIG).exists():
        (folder / METRICS).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
