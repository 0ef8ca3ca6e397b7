"""Run a configuration and write its folder."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.checkpoint import FOLDER as CHECKPOINTS
from fedlora.engines.checkpoint import PATHS, Checkpoints, config_digest
from fedlora.engines.federation import Federation
from fedlora.engines.in_process import InProcess
from fedlora.engines.inputs import digest_inputs
from fedlora.engines.loop import ENGINES, Event, Loop, Observe, Take, Watch
from fedlora.engines.model_spec import RemoteModel
from fedlora.engines.record import RoundRecord
from fedlora.files import RefusedFileError, save_json, save_tree
from fedlora.runs.callbacks import Callback, Callbacks, End, Start
from fedlora.runs.config import AnyConfig, Config, Overrides, to_config
from fedlora.runs.error_log import tracebacks_in
from fedlora.runs.file_names import CONFIG, INITIAL, PEFT_CONFIG, ROWS
from fedlora.runs.folder import RunFolder
from fedlora.runs.interrupt import Stop, explain_full_disk, lock_folder
from fedlora.runs.progress_writer import ProgressWriter
from fedlora.runs.recorder import RunRecorder
from fedlora.runs.result import Rounds
from fedlora.runs.sections import EMBEDDED
from fedlora.runs.summary import data_distribution, describe_base, describe_labels, summarise
from fedlora.runs.trackers._callback import Tracking
from fedlora.schema import ConfigError, Table, merge_tables
from fedlora.training.peft_model import read_peft_config
from fedlora.training.ranks import is_parallel
from fedlora.types import Tree


@dataclass(frozen=True)
class Result(Rounds):
    """A run that has ended: its summary, the records of its rounds, and the shared and the clients' leaves."""

    summary: Mapping[str, Any]
    records: list[RoundRecord] = field(repr=False)
    shared: Tree = field(repr=False)
    kept: Mapping[int, Tree] = field(repr=False)
    folder: Path | None = None


# Runs an engine with ``take``; returns the leaves that each client keeps, unless the last round has them.
Drive = Callable[[Config, Federation, Watch, Observe | None, Take], Mapping[int, Tree] | None]


def run_config(
    config: AnyConfig,
    out: str | Path | None = None,
    watch: Watch = lambda event: None,
    observe: Observe | None = None,
    drive: Drive | None = None,
    again: bool = False,
    callbacks: Sequence[Any] = (),
    overrides: Overrides = (),
) -> Result:
    """Run a configuration to its end, or to Ctrl-C; see ``fedlora.run`` for the arguments and the errors.

    ``drive`` runs the rounds, instead of the engine that ``engine.name`` selects.
    """
    folder = None if out is None else Path(out).expanduser()
    config = to_config(config, overrides)
    for name, tracker in config.track.trackers.items():
        tracker.check(name)
    builtin: list[Callback] = [] if folder is None else [ProgressWriter(folder)]
    builtin += [Tracking(config.track.trackers)] if config.track.trackers else []
    all_callbacks = Callbacks(callbacks, builtin)
    engine = None if drive is not None else _load_engine(config.engine.name)
    if config.party and (engine is None or not issubclass(engine, InProcess)):
        raise ConfigError(
            "[[party]] tables are for a rehearsal in one process; set engine.name to 'inprocess', or leave them out "
            "and let each node's configuration state its own settings."
        )
    stop = Stop(is_patient=engine is not None and engine.steps_here and not is_parallel())
    with lock_folder(folder), explain_full_disk(folder), tracebacks_in(folder, CONFIG):
        with nullcontext() if folder is None else RunFolder(folder).claim(again):
            federation = config.federation(combines=drive is not None)
            recorder = build_recorder(config, federation, folder, stop, again, all_callbacks)
        try:
            with stop.listening() if drive is None else nullcontext():
                result = _run_rounds(config, federation, recorder, stop.wrap(all_callbacks.wrap(watch)), observe, drive)
        finally:
            if federation.trainers is not None:  # their network is the caller's, and may be in another run afterwards
                federation.model.reset(config.seed)
    if stop.is_requested and not recorder.interrupted:  # too late for this run, but a caller may begin another
        raise KeyboardInterrupt
    return result


def build_recorder(
    config: Config, f: Federation, folder: Path | None, stop: Stop, again: bool, callbacks: Callbacks
) -> RunRecorder:
    """Build the recorder and write the configuration. Raises ``ValueError`` if the run cannot be resumed."""
    if folder is None:
        return RunRecorder(None, None, stop, callbacks)
    table, run = _table_to_repeat(config, f), RunFolder(folder)
    recorder = RunRecorder(folder, _checkpoints(config, f, folder, table), stop, callbacks)
    if again:
        recorder.find()
        if recorder.saved is None and run.has_summary and run.records:
            raise ConfigError(f"{str(folder)!r} holds rounds, but no checkpoint; run it anew in another folder.")
        if recorder.saved is not None and (run.is_finished(config.rounds) or recorder.saved.number > config.rounds):
            raise ConfigError(f"{str(folder)!r} holds this run, finished; raise rounds, or choose another folder.")
    run.remove_partial_files()
    if recorder.saved is not None and (start := run.initial):
        f.model.start_at(start)
    elif f.model.own_start:
        save_tree(folder / INITIAL, f.model.own_start)
        peft = f.model.spec.peft if isinstance(f.model, RemoteModel) else read_peft_config(f.model.network)
        save_json(folder / PEFT_CONFIG, peft)
    run.write_config(table)
    if (rows := data_distribution(f)) is not None:
        save_json(folder / ROWS, rows)
    return recorder


def check_same(config: Config, folder: Path) -> None:
    """Raise ``ValueError`` if a folder's run has another configuration, other data or another model."""
    f = config.federation()
    checkpoints = _checkpoints(config, f, folder, _table_to_repeat(config, f))
    if (saved := checkpoints.newest()) is not None:
        checkpoints.check_inputs(saved)


def _checkpoints(config: Config, f: Federation, folder: Path, table: Table) -> Checkpoints:
    return Checkpoints(
        folder / CHECKPOINTS, config_digest(table), config.task.metric, config.checkpoint, digest_inputs(f),
        config.task.is_higher_better,
    )  # fmt: skip


def _table_to_repeat(config: Config, f: Federation) -> Table:
    """Return the table that repeats a run from any folder, on any machine: with absolute paths."""
    table = _with_absolute_paths(merge_tables(config.table, {"training": {"precision": f.training.precision}}))
    if config.party:
        table["party"] = [_with_absolute_paths(party) for party in table["party"]]
    return table


def _with_absolute_paths(table: Table) -> Table:
    table = dict(table)
    for section, key in (place.split(".") for place in PATHS):
        value = table.get(section, {}).get(key)
        if isinstance(value, str) and value not in EMBEDDED and (path := Path(value).expanduser()).exists():
            table[section] = {**table[section], key: str(path.absolute())}
    return table


def _run_rounds(
    config: Config, f: Federation, recorder: RunRecorder, watch: Watch, observe: Observe | None, drive: Drive | None
) -> Result:
    """Run the rounds, and write the result."""
    refused = recorder.checkpoints.refused if recorder.checkpoints else []
    start = Start(config, recorder.folder, recorder.records, lambda text: watch(Event("note", 0, text=text)))
    with recorder.callbacks.running(start), recorder.writing():
        for note in (*f.notes, *(f"{why}; the checkpoint before it is used." for why in refused)):
            start.note(note)
        try:
            kept = (drive or _load_engine(config.engine.name).drive)(config, f, watch, observe, recorder.take)
        except KeyboardInterrupt:
            kept, recorder.interrupted = None, True
    result = finish_run(config, f, recorder, kept, watch, has_kept=drive is None)
    recorder.callbacks.end(End("interrupted" if result.summary["interrupted"] else "finished", result.summary))
    return result


def finish_run(
    config: Config, f: Federation, recorder: RunRecorder, kept: Mapping[int, Tree] | None, watch: Watch, has_kept: bool
) -> Result:
    """Write the result of the rounds so far, and return it.

    ``kept`` has the leaves that clients keep; None if the last round has them. ``has_kept`` is whether this machine has
    them.
    """
    last = recorder.last
    shared = last.shared if last else f.model.initial(config.seed)
    kept = kept if kept is not None else last.kept if last else {}
    base_updates = last.base_updates if last else BaseUpdateLog()
    refused = recorder.checkpoints.refused if recorder.checkpoints else []
    resumed = recorder.checkpoints.notes.get("resumed") if recorder.checkpoints else None
    summary = {
        **_summarise(config, f, recorder, recorder.records, recorder.interrupted),
        "base_updates": len(base_updates),
        "kept": has_kept,
        **({"resumed": list(resumed)} if resumed else {}),
        **({"refused": refused} if refused else {}),
    }
    if recorder.folder is not None and (last is not None or not recorder.records):  # else no new round was finished
        summary |= _write_best(config, f, recorder, watch)
        RunFolder(recorder.folder).write_result(shared, kept, base_updates, summary)
    return Result(summary, recorder.records, shared, kept, recorder.folder)


def _summarise(
    config: Config, f: Federation, recorder: RunRecorder, records: list[RoundRecord], interrupted: bool
) -> dict[str, Any]:
    """Return the summary of some rounds, with the privacy of all rounds and the reading of labels."""
    return {
        **summarise(config, records, interrupted, recorder.seconds),
        **f.report_privacy(len(recorder.records)),
        **describe_labels(f, recorder.readings),
        **describe_base(f.model.network, f.model.precision),
        **({"notes": list(f.notes)} if f.notes else {}),
    }


def _write_best(config: Config, f: Federation, recorder: RunRecorder, watch: Watch) -> dict[str, Any]:
    """Write the best round's model to the folder ``best``, and return its entry in the summary."""
    assert recorder.folder is not None and recorder.checkpoints is not None
    try:
        model = recorder.checkpoints.best_model(f)
    except RefusedFileError as error:
        watch(Event("note", 0, text=f"{error}; the best round's model is not written."))
        return {}
    if model is None:
        return {}
    shared, states, base_updates = model
    best = {k: v for k, v in recorder.checkpoints.best.items() if k != "file"}
    records, run = recorder.records[: best["round"]], RunFolder(recorder.folder)
    run.best.write_config(run.table)
    run.best.write_records(records)
    summary = {
        **_summarise(config, f, recorder, records, False), "base_updates": len(base_updates), "kept": bool(states),
        "best": best,
    }  # fmt: skip
    run.best.write_result(shared, {client: state.kept for client, state in states.items()}, base_updates, summary)
    return {"best": best}


def _load_engine(name: str) -> type[Loop]:
    """Return the engine of a name. Raises ``ConfigError`` if a package that it needs is not installed."""
    try:
        return ENGINES.load(name)
    except ImportError as error:
        raise ConfigError(
            f"engine.name is {name!r}, but {error.name} is not installed; install fedlora[{name}], or set engine.name "
            "to 'inprocess'."
        ) from error
