"""Base classes of trackers: the settings, and the session that receives the figures of one run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from fedlora.schema import ConfigError

ATTENDANCE = "attendance"  # the name of the text about missing clients, at every tracker


@dataclass(frozen=True)
class RunInfo:
    """The run that a session is opened for."""

    name: str  # of the run's folder
    folder: Path | None
    settings: Mapping[str, Any]  # the configuration, with dotted keys
    known: str | None  # ``TrackerSession.run`` of the process before, for a run that is resumed


class TrackerSession(ABC):
    """One run at one tracker. Its methods raise one of ``errors`` if the tracker fails."""

    run: str  # the tracker's name or id of the run
    errors: tuple[type[Exception], ...] = (OSError,)

    @abstractmethod
    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Log the figures of round ``number``, from 1."""

    @abstractmethod
    def describe(self, number: int, text: str) -> None:
        """Store the text about missing and quarantined clients, after round ``number``.

        Called before ``close`` if there is such a text. It replaces an earlier one.
        """

    @abstractmethod
    def close(self, state: str) -> None:
        """End the run: "finished", "interrupted" or "failed"."""


@dataclass(frozen=True)
class Tracker(ABC):
    """Settings of one tracker; the fields are the keys of its table.

    A tracker of another package is a frozen dataclass that defines ``open``, and imports what it needs there. Settings
    are written to the run's folder, so no field may hold a secret.
    """

    package: ClassVar[str] = ""  # the package that ``open`` imports; empty: none that could be missing
    extra: ClassVar[str] = ""  # the extra of fedlora that installs it; empty: none

    @abstractmethod
    def open(self, info: RunInfo) -> TrackerSession:
        """Begin a run at the tracker, or resume ``info.known``."""

    def check(self, name: str) -> None:
        """Raise ``ConfigError`` if the package is not installed."""
        if self.package and find_spec(self.package) is None:
            requirement = f"fedlora[{self.extra}]" if self.extra else self.package
            raise ConfigError(
                f"[track] names {name!r}, but {self.package} is not installed; run `pip install '{requirement}'`, or "
                f"leave track.{name} out."
            )

    def open_errors(self) -> tuple[type[Exception], ...]:
        """Return the exceptions that ``open`` may raise."""
        return (OSError, ValueError)
