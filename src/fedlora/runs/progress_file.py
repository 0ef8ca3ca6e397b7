"""Read the progress of a running run from its folder, without torch.

``progress.json`` has the state within a round, ``metrics.jsonl`` the finished rounds. The first is replaced as a whole,
so a reader never sees half of it. It is not synced to disk, since nothing depends on it after a crash.
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


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


def _read_table(path: Path) -> dict[str, Any] | None:
    """Read a JSON table; None if there is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) else None


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError, IndexError):
        return Path(f"/proc/{pid}").exists() or not Path("/proc").exists()
    return state != "Z"


def _start_time(pid: int) -> str | None:
    """Return the kernel's start time of a process, since process ids are reused; None if it is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def process_id() -> dict[str, Any]:
    """Return the identity of this process, for ``is_running``."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "born": _start_time(os.getpid())}


def is_running(process: Mapping[str, Any]) -> bool:
    """Whether the process of a ``process_id`` runs; assumed of a process on another machine."""
    pid = process.get("pid")
    if process.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    return is_alive(pid) and process.get("born") in (None, _start_time(pid))


@dataclass(frozen=True)
class RunStatus:
    """The status of a run."""

    state: str  # "waiting", "loading", "running" or one of OVER
    progress: Mapping[str, Any]  # ``progress.json``; empty before the run begins
    records: list[RoundRecord]  # of the finished rounds

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.state in OVER


@dataclass
class ProgressReader:
    """Reads the status of one run repeatedly, and only the new lines of its metrics."""

    folder: Path
    _records: list[RoundRecord] = field(default_factory=list, init=False)
    _offset: int = field(default=0, init=False)  # bytes of the metrics that were read
    _inode: int = field(default=0, init=False)  # of the metrics: a run that is resumed may write a new file

    def read(self) -> RunStatus:
        """Return the status of the run now. Raises ``ValueError`` for the folder of a comparison."""
        if (self.folder / COMPARISON).exists():
            raise ValueError(f"{str(self.folder)!r} is a comparison; name the folder of one of its runs.")
        progress = _read_table(self.folder / PROGRESS)
        records = self._read_metrics()
        if progress is not None and progress.get("form") == 1:
            state = progress.get("state", RUNNING)
            return RunStatus(state if state != RUNNING or is_running(progress) else LOST, progress, records)
        summary = _read_table(self.folder / SUMMARY)  # the run has not begun, or is of an earlier version
        if summary is None:
            return RunStatus(LOADING if (self.folder / METRICS).exists() else WAITING, {}, records)
        return RunStatus("interrupted" if summary.get("interrupted") else "finished", {}, records)

    def _read_metrics(self) -> list[RoundRecord]:
        try:
            with open(self.folder / METRICS, "rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self._records, self._offset, self._inode = [], 0, stat.st_ino
                file.seek(self._offset)
                lines, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(lines) + len(newline)
        self._records += [json.loads(line) for line in lines.splitlines() if line.strip()]
        return list(self._records)
