"""Writes the rounds of a run, each before the next begins, and resumes a run from its checkpoint."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from fedlora.engines.checkpoint import Checkpoint, Checkpoints
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Loop, Round, ServerState, explain_overflow
from fedlora.engines.record import RoundRecord
from fedlora.files import write
from fedlora.runs.callbacks import CallbackError, Callbacks
from fedlora.runs.file_names import METRICS
from fedlora.runs.folder import RunFolder
from fedlora.runs.interrupt import Stop
from fedlora.security.validation.screen import write_quarantine


@dataclass
class RunRecorder:
    """Writes records to ``metrics.jsonl``, and checkpoints, if the run has a folder."""

    folder: Path | None
    checkpoints: Checkpoints | None
    stop: Stop
    callbacks: Callbacks
    records: list[RoundRecord] = field(default_factory=list)
    last: Round | None = None  # the last finished round, of this process or of the one before
    saved: Checkpoint | None = None  # the checkpoint that the run is resumed from
    readings: dict[int, str] = field(default_factory=dict)  # client -> how it reads the labels of its own data
    interrupted: bool = False
    _began: float = field(default_factory=time.perf_counter)
    _file: IO[str] | None = None

    def find(self) -> None:
        """Find the newest sound checkpoint, and read the records of its rounds.

        Raises ``ValueError`` if no checkpoint is sound, or if the data or the base have changed.
        """
        assert self.folder is not None and self.checkpoints is not None
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
        """The duration of the run, with the saved part of earlier processes."""
        earlier = self.saved.about["notes"].get("seconds", 0.0) if self.saved else 0.0
        return earlier + time.perf_counter() - self._began

    def take(self, engine: Loop, f: Federation) -> None:
        """Run and record all rounds of an engine, to the end or to Ctrl-C."""
        state = self.restore(engine, f)
        try:
            with explain_overflow():
                for done in engine.run(f, state):
                    self.add(done, engine, f)
                    if done.number + 1 < f.rounds:
                        self.stop.check()
        except (KeyboardInterrupt, CallbackError) as stopped:
            self.interrupted = True
            if self.checkpoints is not None:
                self.checkpoints.save()
            if isinstance(stopped, CallbackError):
                raise

    def add(self, done: Round, engine: Loop, f: Federation) -> None:
        """Record a finished round: its line of metrics, its quarantined uploads, and a checkpoint if that is due."""
        self.last = done
        write_quarantine(self.folder, done.record["round"], done.bad, f.validation)
        self.records = [*self.records, done.record]
        if self._file is not None:
            self._file.write(json.dumps(done.record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.readings = {**self.readings, **engine.readings()}
        if self.checkpoints is not None:
            self.checkpoints.notes["seconds"] = self.seconds
            self.checkpoints.notes["readings"] = {str(k): v for k, v in self.readings.items()}
            self.checkpoints.after(done, engine, done.number + 1 >= f.rounds)
        self.callbacks.round(done.record)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open the metrics file, after removing lines that are cut off or beyond the checkpoint."""
        if self.folder is None:
            yield
            return
        path = self.folder / METRICS
        lines = "".join(islice(RunFolder(self.folder).lines(), len(self.records)))
        if path.read_text(encoding="utf-8") != lines:
            write(path, lines.encode())
        with open(path, "a", encoding="utf-8") as self._file:
            yield

    def restore(self, engine: Loop, f: Federation) -> ServerState | None:
        """Return the state of the checkpoint to go on from, loaded into the engine; None at the start of a run."""
        if self.checkpoints is None:
            return None
        self.checkpoints.begin(f)
        if self.saved is None:
            return None
        state = self.checkpoints.load(self.saved, f, engine)
        kept = {client: own.kept for client, own in (engine.client_states(state) or {}).items()}
        self.last = Round(
            state.number - 1, state.shared, kept, state.base_updates, self.records[-1], state.channel.ledger, state
        )
        return state
