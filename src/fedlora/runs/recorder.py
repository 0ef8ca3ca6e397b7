"""Takes a run's rounds as they come, each on disk before the next begins, and lets a run go on from there."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from fedlora.engines.checkpoint import Checkpoints, Saved
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Loop, Round, ServerState, explain_overflow
from fedlora.engines.record import RoundRecord
from fedlora.files import write
from fedlora.runs.callbacks import CallbackError, Callbacks
from fedlora.runs.file_names import METRICS
from fedlora.runs.folder import RunFolder
from fedlora.runs.interrupt import Stop
from fedlora.security.validation import Validation, quarantine


@dataclass
class RunRecorder:
    """The records of a run, in ``metrics.jsonl`` where there is a folder, and a checkpoint with them."""

    folder: Path | None
    checkpoints: Checkpoints | None = None
    stop: Stop = field(default_factory=Stop)
    validation: Validation = field(default_factory=Validation)
    records: list[RoundRecord] = field(default_factory=list)
    last: Round | None = None  # the last finished one, of this process or of the one before
    saved: Saved | None = None  # where the run goes on from
    readings: dict[int, str] = field(default_factory=dict)  # client -> how it reads the labels of its own data
    interrupted: bool = False
    told: Callbacks = field(default_factory=Callbacks)
    _began: float = field(default_factory=time.perf_counter)
    _file: IO[str] | None = None

    def find(self) -> None:
        """Looks for the newest sound checkpoint, and for the records of the rounds that it counts.

        ``ValueError`` where there are checkpoints, but none to go on from, or the data or the base have changed.
        """
        assert self.folder is not None and self.checkpoints is not None, "a run without a folder leaves nothing"
        self.saved = self.checkpoints.newest()
        if self.saved is not None:
            self.checkpoints.check_inputs(self.saved)
        number = self.saved.number if self.saved else 0
        self.records = [record for record in RunFolder(self.folder).records if record["round"] <= number]
        if len(self.records) < number:
            raise ValueError(
                f"{str(self.folder / METRICS)!r} has {len(self.records)} of the {number} rounds that the checkpoint "
                "counts, it was cut off or edited; choose another folder and run it anew."
            )
        if self.saved is not None:
            notes = self.saved.about["notes"]
            self.checkpoints.notes = {**notes, "resumed": [*notes.get("resumed", []), number]}
            self.readings = {int(client): how for client, how in notes.get("readings", {}).items()}

    @property
    def seconds(self) -> float:
        """That the run has taken, in all its processes, as far as they were saved."""
        earlier = self.saved.about["notes"].get("seconds", 0.0) if self.saved else 0.0
        return earlier + time.perf_counter() - self._began

    @property
    def resumed(self) -> list[int]:
        """After how many rounds it went on, each time that it did."""
        return list(self.checkpoints.notes.get("resumed", [])) if self.checkpoints else []

    def take(self, engine: Loop, f: Federation) -> None:
        """Every round of an engine, to the end or to Ctrl-C."""
        at = self._restored(engine, f)
        try:
            for self.last in explain_overflow(engine.run(f, at)):
                quarantine.write_quarantine(self.folder, self.last.record["round"], self.last.bad, self.validation)
                self._line(self.last.record)
                last = self.last.number + 1 >= f.rounds
                self.readings = {**self.readings, **engine.readings()}
                if self.checkpoints is not None:
                    self.checkpoints.notes["seconds"] = self.seconds
                    self.checkpoints.notes["readings"] = {str(k): v for k, v in self.readings.items()}
                    self.checkpoints.after(self.last, engine, last)
                self.told.round(self.last.record)
                if not last:
                    self.stop.look()
        except (KeyboardInterrupt, CallbackError) as stopped:
            self.interrupted = True
            if self.checkpoints is not None:
                self.checkpoints.save()
            if isinstance(stopped, CallbackError):
                raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While the metrics file is open: it has the records that count, and no others."""
        if self.folder is None:
            yield
            return
        path = self.folder / METRICS
        known = "".join(islice(RunFolder(self.folder).lines(), len(self.records)))
        if path.read_text(encoding="utf-8") != known:  # a line was cut off, or its round was not saved
            write(path, known.encode())
        with open(path, "a", encoding="utf-8") as self._file:
            yield

    def _restored(self, engine: Loop, f: Federation) -> ServerState | None:
        if self.checkpoints is None:
            return None
        self.checkpoints.begin(f)
        if self.saved is None:
            return None
        at = self.checkpoints.load(self.saved, f, engine)
        kept = {client: private.kept for client, private in (engine.client_states(at) or {}).items()}
        self.last = Round(at.number - 1, at.shared, kept, at.base_updates, self.records[-1], at.channel.ledger, at)
        return at

    def _line(self, record: RoundRecord) -> None:
        self.records = [*self.records, record]
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
