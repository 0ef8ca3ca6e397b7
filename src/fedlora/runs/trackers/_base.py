"""What a tracker is: settings that open a session, which takes the figures of one run round by round."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from fedlora.schema import ConfigError

ATTENDANCE = "attendance"  # the name of the text about missing clients, at every tracker


@dataclass(frozen=True)
class Told:
    """What a tracker is told of a run when it begins, or goes on."""

    name: str  # of the run: its folder's
    folder: Path | None
    settings: Mapping[str, Any]  # the configuration, with dotted keys
    known: str | None  # what the tracker called the run, where it goes on


class Session(ABC):
    """One run at one tracker. Whatever goes wrong there is raised as one of ``errors``."""

    run: str  # what the tracker calls it
    errors: tuple[type[Exception], ...] = (OSError,)

    @abstractmethod
    def log(self, number: int, values: Mapping[str, float]) -> None:
        """The figures of round ``number``, from 1."""

    @abstractmethod
    def describe(self, number: int, text: str) -> None:
        """Which clients were missing or quarantined and whom the means are over, after round ``number``.

        Called before ``close``, and only where there is something to say; a later text replaces the one before.
        """

    @abstractmethod
    def close(self, state: str) -> None:
        """The run is over: "finished", "interrupted" or "failed"."""


@dataclass(frozen=True)
class Tracker(ABC):
    """Settings of one tracker; the fields are the keys of its table.

    A tracker of another package is a frozen dataclass that defines ``open``, and imports what it needs there. Settings
    are kept in the run's folder, so no field may hold a secret.
    """

    package: ClassVar[str] = ""  # that ``open`` imports; empty: none that could be missing
    extra: ClassVar[str] = ""  # of fedlora, which installs it; empty: pip is asked for ``package``

    @abstractmethod
    def open(self, told: Told) -> Session:
        """Begins a run at the tracker, or goes on with the one that it knows."""

    def check(self, name: str) -> None:
        """``ConfigError`` where the package is not there."""
        if self.package and find_spec(self.package) is None:
            wanted = f"fedlora[{self.extra}]" if self.extra else self.package
            raise ConfigError(
                f"[track] names {name!r}, but {self.package} is not installed; run `pip install '{wanted}'`, or leave "
                f"track.{name} out."
            )

    def refusals(self) -> tuple[type[Exception], ...]:
        """What ``open`` may raise."""
        return (OSError, ValueError)
