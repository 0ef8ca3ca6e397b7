"""The callback that sends each round's figures to the trackers, once."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import Attendance
from fedlora.runs.callbacks import Callback, End, Start
from fedlora.runs.file_names import TRACKERS
from fedlora.runs.progress_file import replace_json
from fedlora.runs.record import round_figures
from fedlora.runs.trackers import RunInfo, Tracker, TrackerSession
from fedlora.schema import ConfigError, flatten_table


@dataclass
class _Line:
    """The state of one tracker."""

    session: TrackerSession
    settings: Mapping[str, Any]
    rounds: int  # the number of rounds that the tracker has
    pending: list[RoundRecord] = field(default_factory=list)
    failing: bool = False


@dataclass
class Tracking(Callback):
    """Sends figures to trackers. If a tracker does not accept a round, it is sent again with the next one."""

    trackers: Mapping[str, Tracker]
    _lines: dict[str, _Line] = field(default_factory=dict, init=False)
    _start: Start = field(init=False)
    _attendance: Attendance = field(init=False)

    def on_start(self, start: Start) -> None:
        self._start, self._attendance = start, Attendance(start.config.clients.members)
        for record in start.records:
            self._attendance.add(record)
        earlier = _read_state(start.folder)
        for name, tracker in self.trackers.items():
            self._lines[name] = self._open(name, tracker, earlier.get(name, {}))
        self._save()
        self._send(start.records)

    def on_round(self, record: RoundRecord) -> None:
        self._attendance.add(record)
        self._send([record])

    def on_end(self, end: End) -> None:
        text = self._attendance.text if self._lines else ""
        for name, line in self._lines.items():
            session = line.session
            self._push(name, line)
            if text:
                self._try(name, line, "take the text about missing clients", session.describe, line.rounds, text)
            self._try(name, line, "close the run", session.close, end.state)
            if line.pending:
                missing = ", ".join(str(record["round"]) for record in line.pending)
                self._note(f"{name} lacks the rounds {missing}; metrics.jsonl has them.")
        self._save()

    def _try(self, name: str, line: _Line, what: str, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except line.session.errors as error:
            self._note(f"{name} could not {what}: {error}")

    def _open(self, name: str, tracker: Tracker, before: Mapping[str, Any]) -> _Line:
        """Resume the tracker's run if it was opened with the same settings; else begin one, from round 1 on."""
        settings, folder = asdict(tracker), self._start.folder
        is_same = before.get("settings") == settings
        run_name = folder.resolve().name if folder is not None else "fedlora"
        info = RunInfo(run_name, folder, flatten_table(self._start.config.table), before["run"] if is_same else None)
        try:
            session = tracker.open(info)
        except tracker.open_errors() as error:
            raise ConfigError(
                f"{name} did not begin: {' '.join(str(error).split())}; mend track.{name}, or leave it out."
            ) from error
        return _Line(session, settings, before["rounds"] if is_same else 0)

    def _send(self, records: Sequence[RoundRecord]) -> None:
        for name, line in self._lines.items():
            line.pending += [record for record in records if record["round"] > line.rounds]
            self._push(name, line)
        self._save()

    def _push(self, name: str, line: _Line) -> None:
        try:
            while line.pending:
                line.session.log(line.pending[0]["round"], round_figures(line.pending[0]))
                line.rounds, line.failing = line.pending.pop(0)["round"], False
        except line.session.errors as error:
            if not line.failing:
                self._note(f"{name} does not take round {line.pending[0]['round']}, it is tried again: {error}")
            line.failing = True

    def _note(self, text: str) -> None:
        self._start.note(" ".join(text.split()))

    def _save(self) -> None:
        if self._lines and self._start.folder is not None:
            lines = self._lines.items()
            state = {n: {"run": x.session.run, "rounds": x.rounds, "settings": x.settings} for n, x in lines}
            replace_json(self._start.folder / TRACKERS, state)


def _read_state(folder: Path | None) -> Mapping[str, Any]:
    """Read the state of the trackers, as ``_save`` wrote it; empty before that."""
    if folder is None or not (folder / TRACKERS).exists():
        return {}
    try:
        return json.loads((folder / TRACKERS).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{str(folder / TRACKERS)!r} is no JSON, it was edited; remove it, and trackers begin a new run."
        ) from error
