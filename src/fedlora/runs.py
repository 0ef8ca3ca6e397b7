"""A Config becomes a federation, is run, and leaves a folder."""

import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedlora.config import Config, ConfigError, dumps, merged
from fedlora.engines.inprocess import InProcess
from fedlora.engines.loop import Observe, Round, Watch
from fedlora.state import save_json, save_tree, write
from fedlora.types import Tree

LAST = 3  # evaluated rounds in the mean that smooths the final figure
METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.toml"


@dataclass(frozen=True)
class Result:
    """A run that has ended: its summary, its rounds' records, and what the parties hold."""

    summary: Mapping[str, Any]
    records: list[Mapping[str, Any]] = field(repr=False)
    shared: Tree = field(repr=False)
    kept: Mapping[int, Tree] = field(repr=False)
    folder: Path | None = None


def run(
    config: Config,
    out: str | Path | None = None,
    watch: Watch = lambda event: None,
    observe: Observe | None = None,
) -> Result:
    """Runs a federation to its end, or to Ctrl-C, and keeps what was finished.

    ``out`` is a new folder: ``config.toml`` (enough to repeat the run), ``metrics.jsonl`` (a line a round, as it
    happens), ``summary.json``, ``shared.safetensors``,
    ``clients/K.safetensors`` and, where the method folds, ``folds.safetensors``. Raises ``ConfigError`` for a
    folder that holds a run already or cannot be written. ``observe`` adds figures of its own to each round's record.
    """
    folder = None if out is None else _fresh(Path(out).expanduser())
    began = time.perf_counter()
    try:
        federation = config.federation()
    except BaseException:
        _left_as_found(folder)
        raise
    if folder is not None:
        precision = {"training": {"precision": federation.training.precision}}
        write(folder / CONFIG, dumps(merged(config.table, precision)).encode())
    records: list[Mapping[str, Any]] = []
    last: Round | None = None
    interrupted = False
    with _lines(folder) as line, TemporaryDirectory(prefix="fedlora-") as place:
        rounds = InProcess(watch, observe, Path(place) if config.engine.spill else None).run(federation)
        try:
            for last in rounds:
                records.append(last.record)
                line(last.record)
        except KeyboardInterrupt:
            interrupted = True
    shared = last.shared if last else federation.model.initial(config.seed)
    kept = last.kept if last else {}
    summary = {
        **summarise(config, records, interrupted, time.perf_counter() - began),
        "labels": list(federation.data.label_names),
        "folds": len(last.folds) if last else 0,
    }
    if folder is not None:
        save_tree(folder / "shared.safetensors", shared)
        if last and len(last.folds):
            save_tree(folder / "folds.safetensors", {p: f._asdict() for p, f in last.folds.everything().items()})
        for client, tree in kept.items():
            if any(tree.values()):
                save_tree(folder / "clients" / f"{client}.safetensors", tree)
        save_json(folder / SUMMARY, summary)
    return Result(summary, records, shared, kept, folder)


def summarise(config: Config, records: list[Mapping[str, Any]], interrupted: bool, seconds: float) -> dict[str, Any]:
    """What a table or a reader wants first; figures are of the last evaluated round, never of the best."""
    evaluated = [record for record in records if "clients" in record]
    found: dict[str, Any] = {
        "method": config.table["method"]["name"],
        "title": config.method.title,
        "personal": config.method.personal,
        "seed": config.seed,
        "rounds": len(records),
        "rounds_asked": config.rounds,
        "interrupted": interrupted,
        "clients": config.clients.count,
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
    if evaluated:
        final = evaluated[-1]
        found["final"] = {key: final[key] for key in ("global", "clients") if key in final}
        tail = evaluated[-LAST:]
        found["last_rounds"] = {"rounds": len(tail), "clients": statistics.fmean(r["clients"]["mean"] for r in tail)}
        if "global" in final:
            found["last_rounds"]["global"] = statistics.fmean(r["global"]["accuracy"] for r in tail)
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


def _fresh(folder: Path) -> Path:
    """An empty folder to write into, or one sentence why not."""
    if (folder / CONFIG).exists() or (folder / SUMMARY).exists():
        raise ConfigError(f"{str(folder)!r} holds a run already; choose another folder with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / METRICS, b"")
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder.") from error
    return folder


def _left_as_found(folder: Path | None) -> None:
    """Takes back what ``_fresh`` made, where the run could not begin."""
    if folder is not None:
        (folder / METRICS).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _lines(folder: Path | None) -> Iterator[Any]:
    """Appends a record as one line, on disk before the next round begins."""
    if folder is None:
        yield lambda record: None
        return
    with open(folder / METRICS, "a", encoding="utf-8") as file:

        def line(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield line
