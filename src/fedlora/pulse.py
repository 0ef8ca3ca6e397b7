"""``progress.json`` in a run's folder: where the run stands between two lines of its metrics, for ``fedlora watch``."""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.callbacks import Callback, End, Record, Start
from fedlora.engines.loop import Event
from fedlora.following import FILE, me, replace

EVERY = 0.5  # seconds between two writings within a round
SAID = 8  # of the last things that were said
LONG = 400  # characters of one of them


@dataclass
class Pulse(Callback):
    """Keeps the file of one run."""

    folder: Path
    every: float = EVERY
    _now: dict[str, Any] = field(default_factory=dict, init=False)
    _said: deque[str] = field(default_factory=lambda: deque(maxlen=SAID), init=False)
    _answered: dict[int, float | None] = field(default_factory=dict, init=False)  # client -> its loss, in this round
    _written: float = field(default=0.0, init=False)

    def on_start(self, start: Start) -> None:
        config, clients = start.config, start.config.clients
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
        self._now |= {"round": event.round + 1, "doing": event.kind, "client": event.client}
        if event.text or time.monotonic() - self._written >= self.every:
            self._write()

    def on_round(self, record: Record) -> None:
        self._answered.clear()
        self._now |= {"round": record["round"] + 1, "doing": "round", "client": None}
        self._write()

    def on_end(self, end: End) -> None:
        self._now |= {"state": end.state, "error": end.error[:LONG]}
        self._write()

    def _say(self, event: Event) -> None:
        who = "" if event.kind == "note" else f"round {event.round + 1}: "
        who += "" if event.client is None else f"client {event.client}: "
        self._said.append(who + event.text[:LONG])

    def _write(self) -> None:
        losses = [loss for loss in self._answered.values() if loss is not None]
        loss = sum(losses) / len(losses) if losses else None
        more = {"answered": len(self._answered), "loss": loss, "said": list(self._said), "at": time.time()}
        replace(self.folder / FILE, {**self._now, **more})
        self._written = time.monotonic()
