"""Where a run's figures go beside its folder: one tracker a file, found by looking in this folder.

``[track]`` names them: ``tensorboard = true``, or a table with a tracker's settings. None of their packages is imported
before a run begins, and then only those that are named.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fedlora.registry import Registry
from fedlora.runs.trackers._base import Session, Told, Tracker
from fedlora.schema import ConfigError, Table, construct, load_class

__all__ = ["TRACKERS", "Session", "Told", "Track", "Tracker", "read"]


TRACKERS = Registry(Tracker, "tracker", group="fedlora.trackers", package=__name__)


@dataclass(frozen=True)
class Track:
    """The ``[track]`` table."""

    trackers: Mapping[str, Tracker] = field(default_factory=dict)

    def table(self) -> Table:
        """As TOML has it, with the defaults written out."""
        return {name: _table(one) for name, one in self.trackers.items()}

    def check(self) -> None:
        """``ConfigError`` where a package is missing: said before a model is loaded."""
        for name, one in self.trackers.items():
            one.check(name)


def read(table: Table) -> Track:
    """Checks ``[track]``. ``ConfigError`` for a tracker that is not known, or a setting that it does not have."""
    found: dict[str, Tracker] = {}
    for name, settings in table.items():
        kind = load_class(TRACKERS, name)
        if not isinstance(settings, bool | dict):
            raise ConfigError(f"track.{name} is {settings!r}; it should be true, false or a table of its settings.")
        if settings is not False:
            found[name] = construct(kind, f"track.{name}", settings if isinstance(settings, dict) else {})
    return Track(found)


def _table(one: Tracker) -> dict[str, Any]:
    return {f.name: value for f in fields(one) if (value := getattr(one, f.name)) is not None}
