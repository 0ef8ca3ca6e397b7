"""Writes ``progress.json`` into the folder of a run, the state between two lines of its metrics."""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.engines.clients import DROPPED
from fedlora.engines.loop import Event
from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import FAULT_TEXTS
from fedlora.runs.callbacks import FAULTS, Callback, End, Start
from fedlora.runs.file_names import PROGRESS
from fedlora.runs.progress_file import process_id, replace_json

INTERVAL = 0.5  # seconds between two writes within a round
MISSING, NOTES = 8, 8  # missing clients and latest notes in the file
LENGTH = 400  # characters of a note


@dataclass
class ProgressWriter(Callback):
    """Writes the file of one run."""

    folder: Path
    _state: dict[str, Any] = field(default_factory=dict, init=False)
    _notes: deque[str] = field(default_factory=lambda: deque(maxlen=NOTES), init=False)
    _losses: dict[int, float | None] = field(default_factory=dict, init=False)  # of this round, by client
    _missing: dict[str, tuple[int, str]] = field(default_factory=dict, init=False)  # client -> first round, reason
    _last_write: float = field(default=0.0, init=False)

    def on_start(self, start: Start) -> None:
        config, clients = start.config, start.config.clients
        for record in start.records:
            self._update_missing(record)
        self._state = {
            "form": 1, "state": "running", **process_id(), "title": config.method.title, "metric": config.task.metric,
            "began": time.time(), "rounds": config.rounds, "clients": clients.members,
            "cohort": clients.per_round or clients.members, "round": len(start.records) + 1, "doing": "starting",
        }  # fmt: skip
        self._write()

    def on_event(self, event: Event) -> None:
        if event.kind == "note" or (event.text and event.kind != "step"):
            where = "" if event.kind == "note" else f"round {event.round + 1}: "
            where += "" if event.client is None else f"client {event.client}: "
            self._notes.append(where + event.text[:LENGTH])
        if event.kind == "note":
            return
        if event.kind == "turn" and event.client is not None:
            self._losses[event.client] = event.loss or None  # 0 stands for a private loss
            self._missing.pop(str(event.client), None)
        if event.kind in FAULTS and event.client is not None:
            self._add_missing(event.client, event.round + 1, event.kind, event.text or DROPPED)
        self._state |= {"round": event.round + 1, "doing": event.kind, "client": event.client}
        if event.text or time.monotonic() - self._last_write >= INTERVAL:
            self._write()

    def on_round(self, record: RoundRecord) -> None:
        self._losses.clear()
        self._update_missing(record)
        self._state |= {"round": record["round"] + 1, "doing": "round", "client": None}
        self._write()

    def on_end(self, end: End) -> None:
        self._state |= {"state": end.state, "error": end.error[:LENGTH]}
        self._write()

    def _update_missing(self, record: RoundRecord) -> None:
        """Mark the clients with a fault as missing, until they take part again."""
        before, self._missing = self._missing, {}
        for kind in reversed(FAULT_TEXTS):  # of several reasons, that of the first kind is shown
            for client, reason in record.get(kind, {}).items():
                if str(client) in before:
                    self._missing[str(client)] = before[str(client)]
                self._add_missing(client, record["round"], kind, reason)

    def _add_missing(self, client: object, round: int, kind: Any, reason: str) -> None:
        since = self._missing.get(str(client), (round, ""))[0]
        self._missing[str(client)] = since, f"{FAULT_TEXTS[kind]}: {reason.removeprefix(f'{kind}: ')[:LENGTH]}"

    def _write(self) -> None:
        losses = [loss for loss in self._losses.values() if loss is not None]
        first = [f"client {k} since round {r}, {why}" for k, (r, why) in list(self._missing.items())[:MISSING]]
        self._last_write = time.monotonic()
        replace_json(self.folder / PROGRESS, self._state | {
            "missing": {"count": len(self._missing), "first": first},
            "answered": len(self._losses),
            "loss": sum(losses) / len(losses) if losses else None,
            "said": list(self._notes),
            "at": time.time(),
        })  # fmt: skip
