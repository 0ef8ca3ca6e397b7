"""A Config becomes a federation, is run, and leaves a folder."""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.checkpoint import FOLDER as CHECKPOINTS
from fedlora.engines.checkpoint import PLACES, Checkpoints, config_digest
from fedlora.engines.federation import Federation
from fedlora.engines.inputs import digest_inputs
from fedlora.engines.loop import ENGINES, Event, Loop, Observe, Take, Watch
from fedlora.engines.record import RoundRecord
from fedlora.files import RefusedFileError, save_json
from fedlora.runs import attendance
from fedlora.runs.callbacks import Start
from fedlora.runs.config import Config, ConfigError, Table, merge_tables
from fedlora.runs.data_distribution import holdings, labels
from fedlora.runs.error_log import tracebacks_in
from fedlora.runs.file_names import CONFIG, ROWS
from fedlora.runs.folder import RunFolder
from fedlora.runs.interrupt import Stop, alone, saying_full
from fedlora.runs.notify import callbacks as telling
from fedlora.runs.notify import ended
from fedlora.runs.record import DIRECTIONS, errors_over_weights
from fedlora.runs.recorder import RunRecorder
from fedlora.runs.result import Rounds
from fedlora.tasks.metrics.scores import KNOWN
from fedlora.types import Tree

LAST = 3  # evaluated rounds in the mean that smooths the final figure
EMBEDDED = ("digits", "demo-vit")  # names of data and models that ship with the library


@dataclass(frozen=True)
class Result(Rounds):
    """A run that has ended: its summary, its rounds' records, and what the parties hold."""

    summary: Mapping[str, Any]
    records: list[RoundRecord] = field(repr=False)
    shared: Tree = field(repr=False)
    kept: Mapping[int, Tree] = field(repr=False)
    folder: Path | None = None


# Lets ``take`` run an engine; returns what each client keeps, where the last round does not know it.
Drive = Callable[[Config, Federation, Watch, Observe | None, Take], Mapping[int, Tree] | None]


def run(
    config: Config,
    out: str | Path | None = None,
    watch: Watch = lambda event: None,
    observe: Observe | None = None,
    drive: Drive | None = None,
    again: bool = False,
    callbacks: Sequence[Any] = (),
) -> Result:
    """Runs a federation to its end, or to Ctrl-C, and keeps what was finished.

    ``out`` is a new folder: ``config.toml`` (enough to repeat the run), ``metrics.jsonl`` (a line a round, as it
    happens), ``summary.json``, ``shared.safetensors``,
    ``clients/K.safetensors`` and, where the method folds, ``base_update.safetensors``. Raises ``ConfigError`` for a
    folder that holds a run already or cannot be written. ``observe`` adds figures of its own to each round's record.
    ``drive`` runs the rounds elsewhere than ``engine.name`` says; with ``again``, ``out`` may hold the beginning of
    this run, which goes on from its last checkpoint. ``callbacks`` are told of the run as it goes. Raises
    ``OSError`` where the disk is full and ``CallbackError`` where a callback raises; finished rounds stay. The
    traceback of an error that nobody expected is in the folder's ``error.log``, too.
    """
    folder = None if out is None else Path(out).expanduser()
    told = telling(config, callbacks, folder)
    stop = Stop(patient=drive is None and _load_engine(config.engine.name).steps_here)
    with alone(folder), saying_full(folder), tracebacks_in(folder, CONFIG):
        with nullcontext() if folder is None else RunFolder(folder).claim(again):
            federation = config.federation(combines=drive is not None)
            recorder = _keeper(config, federation, folder, stop, again)
            recorder.told = told
        with stop.listening() if drive is None else nullcontext():
            result = _kept(config, federation, recorder, stop.watched(told.watched(watch)), observe, drive)
    if stop.asked and not recorder.interrupted:  # too late to stop this run, but not whatever would come after it
        raise KeyboardInterrupt
    return result


def _keeper(config: Config, f: Federation, folder: Path | None, stop: Stop, again: bool) -> RunRecorder:
    """Where rounds go to. ``ValueError`` where a run is to go on and cannot, before anything is written."""
    if folder is None:
        return RunRecorder(None, stop=stop, validation=config.validation)
    table, run = _table_to_repeat(config, f), RunFolder(folder)
    recorder = RunRecorder(folder, _checkpoints(config, f, folder, table), stop, config.validation)
    if again:
        recorder.find()
        if recorder.saved is None and run.has_summary and run.records:
            raise ConfigError(f"{str(folder)!r} holds rounds, but no checkpoint; run it anew in another folder.")
        if recorder.saved is not None and (run.is_finished(config.rounds) or recorder.saved.number > config.rounds):
            raise ConfigError(f"{str(folder)!r} holds this run, finished; raise rounds, or choose another folder.")
    run.remove_partial_files()
    run.write_config(table)
    if (rows := holdings(f)) is not None:
        save_json(folder / ROWS, rows)
    return recorder


def check_same(config: Config, folder: Path) -> None:
    """``ValueError`` where a folder's run is of another configuration, or was made of other data or another model."""
    f = config.federation()
    checkpoints = _checkpoints(config, f, folder, _table_to_repeat(config, f))
    if (saved := checkpoints.newest()) is not None:
        checkpoints.check_inputs(saved)


def _checkpoints(config: Config, f: Federation, folder: Path, table: Table) -> Checkpoints:
    return Checkpoints(
        folder / CHECKPOINTS, config_digest(table), config.task.metric, config.checkpoint, digest_inputs(f)
    )


def _table_to_repeat(config: Config, f: Federation) -> Table:
    """The table that repeats a run from any folder, on any machine."""
    return _with_absolute_paths(merge_tables(config.table, {"training": {"precision": f.training.precision}}))


def _with_absolute_paths(table: Table) -> Table:
    """Replace local files and folders by their absolute paths, so that the table means the same from any folder."""
    found = dict(table)
    for section, key in (place.split(".") for place in PLACES):
        value = found.get(section, {}).get(key)
        if isinstance(value, str) and value not in EMBEDDED and (path := Path(value).expanduser()).exists():
            found[section] = {**found[section], key: str(path.absolute())}
    return found


def _kept(
    config: Config, f: Federation, recorder: RunRecorder, watch: Watch, observe: Observe | None, drive: Drive | None
) -> Result:
    """The rounds, and what they leave."""
    refused = recorder.checkpoints.refused if recorder.checkpoints else []
    start = Start(config, recorder.folder, recorder.records, lambda text: watch(Event("note", 0, text=text)))
    with recorder.told.running(start), recorder.writing():
        for note in (*f.notes, *(f"{why}; the checkpoint before it is used." for why in refused)):
            start.say(note)
        try:
            kept = (drive or _load_engine(config.engine.name).drive)(config, f, watch, observe, recorder.take)
        except KeyboardInterrupt:
            kept, recorder.interrupted = None, True
    last = recorder.last
    shared = last.shared if last else f.model.initial(config.seed)
    kept = kept if kept is not None else last.kept if last else {}
    summary = {
        **summarise(config, recorder.records, recorder.interrupted, recorder.seconds),
        **_of_rows(f, recorder),
        "base_updates": len(last.base_updates) if last else 0,
        "kept": drive is None,  # whether this folder has what clients keep for themselves
        **({"resumed": recorder.resumed} if recorder.resumed else {}),
        **({"refused": refused} if refused else {}),
    }
    folder = recorder.folder
    if folder is not None and (last is not None or not recorder.records):  # else it was broken off before a new round
        summary |= _left_best(config, f, recorder, watch)
        RunFolder(folder).write_result(shared, kept, last.base_updates if last else BaseUpdateLog(), summary)
    recorder.told.ended(ended(summary))
    return Result(summary, recorder.records, shared, kept, folder)


def _of_rows(f: Federation, recorder: RunRecorder) -> dict[str, Any]:
    """What is guaranteed to the rows of all rounds, how their labels were read, and what there is to tell of them."""
    notes = {"notes": list(f.notes)} if f.notes else {}
    return {**f.privacy_ledger.report(len(recorder.records)), **labels(f, recorder.readings), **notes}


def _left_best(config: Config, f: Federation, recorder: RunRecorder, watch: Watch) -> dict[str, Any]:
    """The best round's model as a run's folder of its own, ``best``; what the summary says of it."""
    assert recorder.folder is not None and recorder.checkpoints is not None
    try:
        found = recorder.checkpoints.best_model(f)
    except RefusedFileError as error:
        watch(Event("note", 0, text=f"{error}; the best round's model is not written."))
        return {}
    if found is None:
        return {}
    shared, states, base_updates = found
    about = {k: v for k, v in recorder.checkpoints.best.items() if k != "file"}
    until = recorder.records[: about["round"]]
    run = RunFolder(recorder.folder)
    run.best.write_config(run.table)
    run.best.write_records(until)
    summary = {
        **summarise(config, until, False, recorder.seconds), **_of_rows(f, recorder), "base_updates": len(base_updates),
        "kept": bool(states), "best": about,
    }  # fmt: skip
    run.best.write_result(shared, {client: own.kept for client, own in states.items()}, base_updates, summary)
    return {"best": about}


def summarise(config: Config, records: list[RoundRecord], interrupted: bool, seconds: float) -> dict[str, Any]:
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
        "bytes": {d: _sums([r["bytes"][d] for r in records]) for d in DIRECTIONS},
        "seconds": {**_sums([r["seconds"] for r in records]), "whole": seconds},
        "errors": {name: statistics.fmean(values) for name, values in errors_over_weights(records).items()},
        "versions": {name: version(name) for name in ("fedlora", "torch", "transformers")},
        "machine": {
            "processor": platform.machine(),
            "device": str(config.engine.chosen()),
            "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    found |= attendance.left_out(records)
    if evaluated:
        final = evaluated[-1]
        found["final"] = {key: final[key] for key in ("global", "clients", "attack") if key in final}
        tail = evaluated[-LAST:]
        found["scored"] = {"clients": attendance.scored(final), "of": config.clients.members}
        found["last_rounds"] = {"rounds": len(tail), "clients": statistics.fmean(r["clients"]["mean"] for r in tail)}
        found["last_rounds"]["fewest"] = min(map(attendance.scored, tail))
        if "global" in final:
            found["last_rounds"]["global"] = statistics.fmean(r["global"][config.task.metric] for r in tail)
    return found


def _sums(rows: list[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(row.get(key, 0) for row in rows) for key in dict.fromkeys(k for row in rows for k in row)}


def _load_engine(name: str) -> type[Loop]:
    """The engine of a name. ``ConfigError`` where a package that it needs is missing."""
    try:
        return ENGINES.load(name)
    except ImportError as error:
        raise ConfigError(
            f"engine.name is {name!r}, but {error.name} is not installed; install fedlora[{name}], or set engine.name "
            "to 'inprocess'."
        ) from error
