"""Feeds trackers: every round once, whatever becomes of a run or of a tracker."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import Attendance
from fedlora.runs.callbacks import Callback, End, Start
from fedlora.runs.file_names import TRACKERS
from fedlora.runs.progress_file import replace
from fedlora.runs.record import figures, flat
from fedlora.runs.trackers import Session, Told, Tracker
from fedlora.schema import ConfigError


@dataclass
class _Line:
    """One tracker's state."""

    session: Session
    settings: Mapping[str, Any]
    rounds: int  # that it has
    pending: list[RoundRecord] = field(default_factory=list)
    failing: bool = False


@dataclass
class Tracking(Callback):
    """Feeds trackers. A round that one of them does not take is kept, and sent again with the next."""

    trackers: Mapping[str, Tracker]
    _lines: dict[str, _Line] = field(default_factory=dict, init=False)
    _start: Start | None = field(default=None, init=False)
    _attendance: Attendance = field(default_factory=lambda: Attendance(0), init=False)

    def on_start(self, start: Start) -> None:
        self._start, self._attendance = start, Attendance(start.config.clients.members)
        for record in start.records:
            self._attendance.take(record)
        earlier = _earlier(start.folder)
        for name, tracker in self.trackers.items():
            self._lines[name] = self._opened(name, tracker, earlier.get(name, {}))
        self._save()
        self._send(start.records)

    def on_round(self, record: RoundRecord) -> None:
        self._attendance.take(record)
        self._send([record])

    def on_end(self, end: End) -> None:
        for name, line in self._lines.items():
            self._push(name, line)
            self._try(name, line, "take the text about missing clients", partial(self._describe, line))
            self._try(name, line, "close the run", partial(line.session.close, end.state))
            if line.pending:
                missing = ", ".join(str(record["round"]) for record in line.pending)
                self._say(f"{name} lacks the rounds {missing}; metrics.jsonl has them.")
        self._save()

    def _describe(self, line: _Line) -> None:
        if text := self._attendance.text:
            line.session.describe(line.rounds, text)

    def _try(self, name: str, line: _Line, what: str, do: Callable[[], None]) -> None:
        try:
            do()
        except line.session.errors as error:
            self._say(f"{name} could not {what}: {error}")

    def _opened(self, name: str, tracker: Tracker, before: Mapping[str, Any]) -> _Line:
        """The run that the tracker knows, if it was opened with the same settings; else a new one, from round 1 on."""
        assert self._start is not None
        settings, folder = asdict(tracker), self._start.folder
        same = before.get("settings") == settings
        called = folder.resolve().name if folder is not None else "fedlora"
        told = Told(called, folder, flat(self._start.config.table), before["run"] if same else None)
        try:
            session = tracker.open(told)
        except tracker.refusals() as error:
            raise ConfigError(
                f"{name} did not begin: {' '.join(str(error).split())}; mend track.{name}, or leave it out."
            ) from error
        return _Line(session, settings, before["rounds"] if same else 0)

    def _send(self, records: Sequence[RoundRecord]) -> None:
        for name, line in self._lines.items():
            line.pending += [record for record in records if record["round"] > line.rounds]
            self._push(name, line)
        self._save()

    def _push(self, name: str, line: _Line) -> None:
        try:
            while line.pending:
                line.session.log(line.pending[0]["round"], figures(line.pending[0]))
                line.rounds, line.failing = line.pending.pop(0)["round"], False
        except line.session.errors as error:
            if not line.failing:
                self._say(f"{name} does not take round {line.pending[0]['round']}, it is tried again: {error}")
            line.failing = True

    def _say(self, text: str) -> None:
        assert self._start is not None
        self._start.say(" ".join(text.split()))

    def _save(self) -> None:
        if self._start is None or self._start.folder is None:
            return
        found = {n: {"run": x.session.run, "rounds": x.rounds, "settings": x.settings} for n, x in self._lines.items()}
        replace(self._start.folder / TRACKERS, found)


def _earlier(folder: Path | None) -> Mapping[str, Any]:
    """What a folder's file says of trackers; nothing where there is none."""
    if folder is None or not (folder / TRACKERS).exists():
        return {}
    try:
        return json.loads((folder / TRACKERS).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{str(folder / TRACKERS)!r} is no JSON, it was edited; remove it, and trackers begin a new run."
        ) from error
