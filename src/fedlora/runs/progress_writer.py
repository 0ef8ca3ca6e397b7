"""``progress.json`` in a run's folder: where the run stands between two lines of its metrics, for ``fedlora watch``."""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.engines.clients import DROPPED
from fedlora.engines.loop import Event
from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import KINDS
from fedlora.runs.callbacks import FAULTS, Callback, End, Start
from fedlora.runs.file_names import PROGRESS
from fedlora.runs.progress_file import me, replace

EVERY = 0.5  # seconds between two writings within a round
MISSING = 8  # clients that are named as missing now
SAID = 8  # of the last things that were said
LONG = 400  # characters of one of them


@dataclass
class ProgressWriter(Callback):
    """Keeps the file of one run."""

    folder: Path
    every: float = EVERY
    _now: dict[str, Any] = field(default_factory=dict, init=False)
    _said: deque[str] = field(default_factory=lambda: deque(maxlen=SAID), init=False)
    _answered: dict[int, float | None] = field(default_factory=dict, init=False)  # client -> its loss, in this round
    _missing: dict[str, tuple[int, str]] = field(default_factory=dict, init=False)  # client -> since which round, why
    _written: float = field(default=0.0, init=False)

    def on_start(self, start: Start) -> None:
        config, clients = start.config, start.config.clients
        for record in start.records:
            self._attended(record)
        self._now = {
            "form": 1, "state": "running", **me(), "title": config.method.title, "metric": config.task.metric,
            "began": time.time(), "rounds": config.rounds, "clients": clients.members,
            "cohort": clients.per_round or clients.members, "round": len(start.records) + 1, "doing": "starting",
        }  # fmt: skip
        self._write()

    def on_event(self, event: Event) -> None:
        if event.kind == "note" or (event.text and event.kind != "step"):
            self._say(event)
        if event.kind == "note":
            return
        if event.kind == "turn" and event.client is not None:
            self._answered[event.client] = event.loss or None  # 0 stands for a loss that privacy keeps
            self._missing.pop(str(event.client), None)
        if event.kind in FAULTS and event.client is not None:
            self._is_missing(event.client, event.round + 1, event.kind, event.text or DROPPED)
        self._now |= {"round": event.round + 1, "doing": event.kind, "client": event.client}
        if event.text or time.monotonic() - self._written >= self.every:
            self._write()

    def on_round(self, record: RoundRecord) -> None:
        self._answered.clear()
        self._attended(record)
        self._now |= {"round": record["round"] + 1, "doing": "round", "client": None}
        self._write()

    def on_end(self, end: End) -> None:
        self._now |= {"state": end.state, "error": end.error[:LONG]}
        self._write()

    def _attended(self, record: RoundRecord) -> None:
        """Who was left out of a finished round is missing until it takes part again."""
        before, self._missing = self._missing, {}
        for kind in reversed(KINDS):  # of several reasons the first kind's is said
            for client, why in record.get(kind, {}).items():
                self._missing |= {str(client): before[str(client)]} if str(client) in before else {}
                self._is_missing(client, record["round"], kind, why)

    def _is_missing(self, client: object, round: int, kind: str, why: str) -> None:
        since = self._missing.get(str(client), (round, ""))[0]
        self._missing[str(client)] = since, f"{KINDS[kind]}: {why.removeprefix(f'{kind}: ')[:LONG]}"

    def _say(self, event: Event) -> None:
        who = "" if event.kind == "note" else f"round {event.round + 1}: "
        who += "" if event.client is None else f"client {event.client}: "
        self._said.append(who + event.text[:LONG])

    def _write(self) -> None:
        losses = [loss for loss in self._answered.values() if loss is not None]
        loss = sum(losses) / len(losses) if losses else None
        some = [f"client {k} since round {r}, {why}" for k, (r, why) in list(self._missing.items())[:MISSING]]
        missing = {"count": len(self._missing), "first": some}
        more = {
            "missing": missing,
            "answered": len(self._answered),
            "loss": loss,
            "said": list(self._said),
            "at": time.time(),
        }
        replace(self.folder / PROGRESS, {**self._now, **more})
        self._written = time.monotonic()
