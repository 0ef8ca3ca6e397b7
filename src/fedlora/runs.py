"""A Config becomes a federation, is run, and leaves a folder."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch

from fedlora.config import Config, ConfigError, dumps, merged
from fedlora.engines import private
from fedlora.engines.federation import Federation
from fedlora.engines.inprocess import InProcess
from fedlora.engines.loop import Event, Observe, Round, Watch, sound
from fedlora.folds import FoldLog
from fedlora.hygiene import Hygiene, shelf
from fedlora.metrics import KNOWN
from fedlora.state import save_json, save_tree, write
from fedlora.types import Tree

LAST = 3  # evaluated rounds in the mean that smooths the final figure
METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.toml"
SHARED, FOLDS = "shared.safetensors", "folds.safetensors"


@dataclass(frozen=True)
class Result:
    """A run that has ended: its summary, its rounds' records, and what the parties hold."""

    summary: Mapping[str, Any]
    records: list[Mapping[str, Any]] = field(repr=False)
    shared: Tree = field(repr=False)
    kept: Mapping[int, Tree] = field(repr=False)
    folder: Path | None = None


Take = Callable[[Iterator[Round]], None]
# Runs a federation's rounds into ``take``; returns what each client keeps, where the last round does not know it.
Drive = Callable[[Config, Federation, Watch, Observe | None, Take], Mapping[int, Tree] | None]


def run(
    config: Config,
    out: str | Path | None = None,
    watch: Watch = lambda event: None,
    observe: Observe | None = None,
    drive: Drive | None = None,
    again: bool = False,
) -> Result:
    """Runs a federation to its end, or to Ctrl-C, and keeps what was finished.

    ``out`` is a new folder: ``config.toml`` (enough to repeat the run), ``metrics.jsonl`` (a line a round, as it
    happens), ``summary.json``, ``shared.safetensors``,
    ``clients/K.safetensors`` and, where the method folds, ``folds.safetensors``. Raises ``ConfigError`` for a
    folder that holds a run already or cannot be written. ``observe`` adds figures of its own to each round's record.
    ``drive`` runs the rounds elsewhere than ``engine.name`` says; with ``again``, ``out`` may hold the beginning of
    this run, and its records stay.
    """
    folder = None if out is None else _fresh(Path(out).expanduser(), again)
    began = time.perf_counter()
    try:
        federation = config.federation(combines=drive is not None)
    except BaseException:
        _left_as_found(folder)
        raise
    if folder is not None:
        precision = {"training": {"precision": federation.training.precision}}
        write(folder / CONFIG, dumps(merged(config.table, precision)).encode())
    for note in federation.notes:
        watch(Event("note", 0, text=note))
    keeper = Keeper(folder, config.hygiene)
    with keeper.writing():
        try:
            kept = (drive or DRIVES[config.engine.name])(config, federation, watch, observe, keeper.take)
        except KeyboardInterrupt:
            kept, keeper.interrupted = None, True
    last = keeper.last
    shared = last.shared if last else federation.model.initial(config.seed)
    kept = kept if kept is not None else last.kept if last else {}
    summary = {
        **summarise(config, keeper.records, keeper.interrupted, time.perf_counter() - began),
        **private.report(federation, len(keeper.records)),
        "labels": list(federation.label_names),
        "folds": len(last.folds) if last else 0,
        "kept": drive is None,  # whether this folder has what clients keep for themselves
        **({"notes": list(federation.notes)} if federation.notes else {}),
    }
    if folder is not None and (last is not None or not keeper.records):  # else it was broken off before a new round
        save_tree(folder / SHARED, shared)
        save_folds(folder, last.folds if last else FoldLog())
        for client, tree in kept.items():
            if any(tree.values()):
                save_tree(clients_file(folder, client), tree)
        save_json(folder / SUMMARY, summary)
    return Result(summary, keeper.records, shared, kept, folder)


def save_folds(folder: Path, log: FoldLog) -> None:
    """The sum of all folds, where there are any."""
    if len(log):
        save_tree(folder / FOLDS, {part: f._asdict() for part, f in log.everything().items()})


def clients_file(folder: Path, client: int) -> Path:
    """Where a run's folder has what a client keeps for itself."""
    return folder / "clients" / f"{client}.safetensors"


def summarise(config: Config, records: list[Mapping[str, Any]], interrupted: bool, seconds: float) -> dict[str, Any]:
    """What a table or a reader wants first; figures are of the last evaluated round, never of the best."""
    evaluated = [record for record in records if "clients" in record]
    found: dict[str, Any] = {
        "method": config.table["method"]["name"],
        "title": config.method.title,
        "personal": config.method.personal,
        "metric": {"name": config.task.metric, "higher": KNOWN[config.task.metric].higher},
        "seed": config.seed,
        "rounds": len(records),
        "rounds_asked": config.rounds,
        "interrupted": interrupted,
        "clients": config.clients.members,
        "bytes": {d: _sums([r["bytes"][d] for r in records]) for d in ("up", "down")},
        "seconds": {**_sums([r["seconds"] for r in records]), "whole": seconds},
        "errors": _errors(records),
        "versions": {name: version(name) for name in ("fedlora", "torch", "transformers")},
        "machine": {
            "processor": platform.machine(),
            "device": str(config.engine.chosen()),
            "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    if bad := shelf.quarantined(records):
        found["quarantined"] = bad
    if evaluated:
        final = evaluated[-1]
        found["final"] = {key: final[key] for key in ("global", "clients", "attack") if key in final}
        tail = evaluated[-LAST:]
        found["last_rounds"] = {"rounds": len(tail), "clients": statistics.fmean(r["clients"]["mean"] for r in tail)}
        if "global" in final:
            found["last_rounds"]["global"] = statistics.fmean(r["global"][config.task.metric] for r in tail)
    return found


def _errors(records: list[Mapping[str, Any]]) -> dict[str, float]:
    """Means over weights and rounds of the relative errors; notes of a method included."""
    sums: dict[str, list[float]] = {}
    for record in records:
        for figures in record.get("weights", {}).values():
            for name, value in figures.items():
                sums.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in sums.items()}


def _sums(rows: list[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(row.get(key, 0) for row in rows) for key in dict.fromkeys(k for row in rows for k in row)}


@dataclass
class Keeper:
    """Takes the rounds as they come, each on disk before the next begins; records that are there already stay."""

    folder: Path | None
    hygiene: Hygiene = field(default_factory=Hygiene)
    records: list[Mapping[str, Any]] = field(default_factory=list)
    last: Round | None = None
    interrupted: bool = False
    _file: IO[str] | None = None

    def take(self, rounds: Iterator[Round]) -> None:
        """Every round of an engine, to the end or to Ctrl-C."""
        try:
            for self.last in sound(rounds):
                shelf.keep(self.folder, self.last.record["round"], self.last.bad, self.hygiene)
                again = [r for r in self.records if r["round"] >= self.last.record["round"]]  # was cut off after it
                self.records = [*(r for r in self.records if r not in again), self.last.record]
                self._write(self.records if again else self.records[-1:], anew=bool(again))
        except KeyboardInterrupt:
            self.interrupted = True

    def _write(self, records: list[Mapping[str, Any]], anew: bool) -> None:
        if self._file is None:
            return
        if anew:
            self._file.truncate(0)
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While the metrics file is open."""
        if self.folder is None:
            yield
            return
        with open(self.folder / METRICS, "a+", encoding="utf-8") as self._file:
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)
            self.records = [json.loads(line) for line in lines if line.endswith("\n")]
            if len(self.records) < len(lines):  # the last one was cut off
                self._write(self.records, anew=True)
            yield


def in_process(config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take) -> None:
    """All turns in this process."""
    with TemporaryDirectory(prefix="fedlora-") as place:
        take(InProcess(watch, observe, Path(place) if config.engine.spill else None).run(f))


def simulated(config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take):
    """Turns in Flower's simulation, on Ray."""
    try:
        from fedlora.flower.simulation import simulate
    except ImportError as error:
        raise ConfigError(
            f"engine.name is 'flower-simulation', but {error.name} is not installed; "
            "install fedlora[flower-simulation], or set engine.name to 'inprocess'."
        ) from error
    return simulate(config, f, watch, observe, take)


DRIVES: Mapping[str, Drive] = {"inprocess": in_process, "flower-simulation": simulated}


def _fresh(folder: Path, again: bool) -> Path:
    """An empty folder to write into, or one sentence why not."""
    if not again and ((folder / CONFIG).exists() or (folder / SUMMARY).exists()):
        raise ConfigError(f"{str(folder)!r} holds a run already; choose another folder with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / METRICS).exists():
            write(folder / METRICS, b"")
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder.") from error
    return folder


def _left_as_found(folder: Path | None) -> None:
    """Takes back what ``_fresh`` made, where the run could not begin."""
    if folder is not None and not (folder / CONFIG).exists():
        (folder / METRICS).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
