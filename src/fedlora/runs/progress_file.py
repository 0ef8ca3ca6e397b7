"""A run under way, read from its folder by whoever wants to know: no torch, and nothing is asked of the run itself.

``progress.json`` says where it stands within a round, ``metrics.jsonl`` has the finished rounds. The first is written
aside and renamed, so a reader always finds it whole; it is not synced, since nothing depends on it after a crash.
"""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.engines.record import RoundRecord
from fedlora.runs.file_names import COMPARISON, METRICS, PROGRESS, SUMMARY

WAITING, LOADING, RUNNING, LOST = "waiting", "loading", "running", "broken off"
OVER = ("finished", "interrupted", "failed", LOST)


def replace(path: Path, value: Mapping[str, Any]) -> None:
    """JSON that a reader finds old or new, never cut off."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(value), encoding="utf-8")
    os.replace(aside, path)


def read(path: Path) -> dict[str, Any] | None:
    """A JSON table; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError, IndexError):
        return Path(f"/proc/{pid}").exists() or not Path("/proc").exists()
    return state != "Z"


def born(pid: int) -> str | None:
    """When a process began, as the kernel counts: numbers of processes come again. None where nobody says."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def me() -> dict[str, Any]:
    """What another process needs in order to see whether this one still runs."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "born": born(os.getpid())}


def lives(said: Mapping[str, Any]) -> bool:
    """Whether the process that said ``me`` still runs; taken for granted of another machine's."""
    if said.get("host") != socket.gethostname() or not isinstance(said.get("pid"), int):
        return True
    return alive(said["pid"]) and said.get("born") in (None, born(said["pid"]))


@dataclass(frozen=True)
class RunStatus:
    """What was found at one look."""

    state: str  # "waiting", "loading", "running" or one of OVER
    progress: Mapping[str, Any]  # what the run says of itself; empty before it begins
    records: list[RoundRecord]  # its finished rounds

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in OVER


@dataclass
class ProgressReader:
    """One run's folder, looked at again and again; only what was added is read."""

    folder: Path
    _records: list[RoundRecord] = field(default_factory=list, init=False)
    _read: int = field(default=0, init=False)  # bytes of the metrics that were taken
    _file: int = field(default=0, init=False)  # which file that was: a run that goes on writes a new one

    def look(self) -> RunStatus:
        """Where the run stands now. ``ValueError`` for a folder of several runs."""
        if (self.folder / COMPARISON).exists():
            raise ValueError(f"{str(self.folder)!r} is a comparison; name the folder of one of its runs.")
        said = read(self.folder / PROGRESS)
        records = self._metrics()
        if said is None or said.get("form") != 1:
            return RunStatus(self._without(), {}, records)
        state = said.get("state", RUNNING)
        if state == RUNNING and not lives(said):
            state = LOST
        return RunStatus(state, said, records)

    def _without(self) -> str:
        """The state of a run that keeps no such file: it has not begun, or is of an earlier version."""
        summary = read(self.folder / SUMMARY)
        if summary is None:
            return LOADING if (self.folder / METRICS).exists() else WAITING
        return "interrupted" if summary.get("interrupted") else "finished"

    def _metrics(self) -> list[RoundRecord]:
        try:
            with open(self.folder / METRICS, "rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self._file or about.st_size < self._read:
                    self._records, self._read, self._file = [], 0, about.st_ino
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._read += len(whole[0]) + len(whole[1])
        self._records += [json.loads(line) for line in whole[0].splitlines() if line.strip()]
        return list(self._records)
