"""Trackers log a run's figures to a service or to files: one tracker a file.

``[track]`` names them: ``tensorboard = true``, or a table with the tracker's settings. Their packages are imported when
a run begins, and only those that are named.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from fedlora.registry import Registry
from fedlora.runs.trackers._base import RunInfo, Tracker, TrackerSession
from fedlora.schema import ConfigError, Table, construct, load_class

__all__ = ["TRACKERS", "RunInfo", "Track", "Tracker", "TrackerSession"]

TRACKERS = Registry(Tracker, "tracker", group="fedlora.trackers", package=__name__)
names, load = TRACKERS.names, TRACKERS.load


@dataclass(frozen=True)
class Track:
    """The ``[track]`` table."""

    trackers: Mapping[str, Tracker] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: Table) -> "Track":
        """Build the trackers of a table. Raises ``ConfigError`` for an unknown tracker or setting."""
        trackers: dict[str, Tracker] = {}
        for name, settings in table.items():
            kind = load_class(TRACKERS, name)
            if not isinstance(settings, bool | dict):
                raise ConfigError(f"track.{name} is {settings!r}; it should be true, false or a table of its settings.")
            if settings is not False:
                trackers[name] = construct(kind, f"track.{name}", settings if isinstance(settings, dict) else {})
        return cls(trackers)

    def to_table(self) -> Table:
        """Return the table of these trackers with all defaults."""
        return {
            name: {f.name: value for f in fields(tracker) if (value := getattr(tracker, f.name)) is not None}
            for name, tracker in self.trackers.items()
        }
