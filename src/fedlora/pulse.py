"""``progress.json`` in a run's folder: where the run stands between two lines of its metrics, for ``fedlora watch``.

Written aside and renamed, so a reader always finds it whole; not synced, since nothing depends on it after a crash.
"""

import json
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.callbacks import Callback, End, Record, Start
from fedlora.engines.loop import Event

FILE = "progress.json"
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
        clients = start.config.clients
        self._now = {
            "form": 1, "state": "running", "pid": os.getpid(), "host": socket.gethostname(),
            "engine": start.config.engine.name, "began": time.time(), "rounds": start.config.rounds,
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


def replace(path: Path, value: Mapping[str, Any]) -> None:
    """JSON that a reader finds old or new, never cut off."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(value), encoding="utf-8")
    os.replace(aside, path)


def read(folder: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none, or one that is not ours."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("form") == 1 else None
