"""Checkpoints of a run: written after its rounds, each whole or not at all, and loaded on resume.

A folder holds ``NUMBER-DIGEST.safetensors`` (the server's state after so many rounds, and the names of its other
files), ``private-NUMBER-DIGEST.safetensors`` (the states of the clients that trained since the last checkpoint) and
``base_updates/NUMBER-DIGEST.safetensors`` (one round's base update). Every file is written once, and the server's state
comes last, so a crash at any moment leaves the checkpoint before.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedlora.engines.base_updates import BaseUpdate, BaseUpdateLog, base_update_from_tree, base_update_to_tree
from fedlora.engines.client_turn import ClientState
from fedlora.engines.comm.channel import Channel
from fedlora.engines.federation import Federation
from fedlora.engines.inputs import compare_inputs, digest_inputs
from fedlora.engines.loop import Loop, Round, ServerState
from fedlora.engines.snapshot import Snapshot, restore_state, states_from_tree, states_to_tree
from fedlora.files import (
    SUFFIX,
    RefusedFileError,
    decode_state,
    digest,
    encode_state,
    load_about,
    read_verified_file,
    remove_temporary_files,
    write_verified_file,
)
from fedlora.text import safe_filename
from fedlora.types import Tree

FOLDER, BASE_UPDATES, FORM = "checkpoints", "base_updates", 2
PATHS = ("task.data", "model.name", "model.start")  # settings that can name a file or a folder
FOREIGN = "holds a run of another configuration"
STATES = f"[0-9]*-{'[0-9a-f]' * 32}{SUFFIX}"


@dataclass(frozen=True)
class CheckpointSettings:
    """The ``[checkpoint]`` table. The last round is always saved."""

    keep: int = 3  # number of last checkpoints that are kept; an older one replaces a damaged one
    every: int = 1  # rounds from one to the next
    best: Literal["global", "clients"] | None = None  # also keep the best round's, by the task's metric

    def __post_init__(self) -> None:
        for key in ("keep", "every"):
            if getattr(self, key) < 1:
                raise ValueError(f"checkpoint.{key} is {getattr(self, key)}; it must be at least 1.")

    def score(self, record: Mapping[str, Any], metric: str) -> float | None:
        """Return the score of a round; None without an evaluation, or if the best round is not kept."""
        scores = record.get(self.best) if self.best is not None else None
        if scores is None:
            return None
        value = float(scores["mean"] if self.best == "clients" else scores[metric])
        return value if math.isfinite(value) else None

    def is_better(self, value: float | None, best: float | None, higher: bool) -> bool:
        """Whether a round is better than the best one so far; of equal rounds the first one counts."""
        if value is None or best is None:
            return value is not None
        return value > best if higher else value < best


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, with all of its files verified."""

    name: str
    about: Mapping[str, Any]
    tree: Tree = field(repr=False)

    @property
    def number(self) -> int:
        """The number of finished rounds."""
        return int(self.about["plain"]["number"])


@dataclass
class Checkpoints:
    """The checkpoints of one run. ``refused`` has the reason for each checkpoint that could not be loaded."""

    folder: Path
    config: str  # a digest of the configuration
    metric: str  # of the task
    settings: CheckpointSettings = field(default_factory=CheckpointSettings)
    inputs: Mapping[str, Any] = field(default_factory=dict)  # digests of the rows and the base, from ``digest_inputs``
    higher: bool = True  # whether a higher value of the metric is better
    notes: dict[str, Any] = field(default_factory=dict)  # plain values that go with the run: seconds, resumed rounds
    refused: list[str] = field(default_factory=list, init=False)
    best: dict[str, Any] | None = field(default=None, init=False)  # round, value, and the file's name
    _initial: str = field(default="", init=False)  # a digest of the leaves that the seed determines
    _base_updates: list[tuple[str, int]] = field(default_factory=list, init=False)  # file, and ``start`` of the log
    _files: dict[int, str | None] = field(default_factory=dict, init=False)  # client -> the file of its state
    _written: dict[int, ClientState] = field(default_factory=dict, init=False)
    _last: Snapshot | None = field(default=None, init=False)  # of the last round, unless that is on disk

    # ------------------------------------------------------------------------------------ saving
    def begin(self, f: Federation) -> None:
        """Prepare the folder, before the first round and on resume."""
        self._initial = digest({part: layer for part, layer in f.model.initial(f.seed).items() if layer})
        for folder in (self.folder, self.folder / BASE_UPDATES):
            remove_temporary_files(folder)

    def after(self, done: Round, engine: Loop, last: bool) -> None:
        """Write the base update of a finished round, and the state if that is due."""
        log = done.base_updates
        for number in range(len(self._base_updates), len(log)):  # each before it is summed with others
            content = encode_state(base_update_to_tree(log.entries[number - log.start]), {})
            name = write_verified_file(self.folder / BASE_UPDATES, f"{number:06d}", content)
            self._base_updates.append((name, log.start))
        self._last = Snapshot.take(done.state, engine.client_states(done.state))
        value = self.settings.score(done.record, self.metric)
        better = self.settings.is_better(value, self.best and self.best["value"], self.higher)
        if better:
            self.best = {"round": self._last.number, "by": self.settings.best, "value": value}
        if last or better or self._last.number % self.settings.every == 0:
            self.save()

    def save(self) -> None:
        """Write the last finished round, unless it is on disk."""
        snapshot = self._last
        if snapshot is None:
            return
        stem = f"{snapshot.number:06d}"
        self._write_client_states(f"private-{stem}", snapshot.states or {})
        tree, about = snapshot.leaves()
        about |= {
            "form": FORM, "config": self.config, "made": self._initial,
            "private": None if snapshot.states is None else self._files, "base_updates": self._base_updates,
            "notes": self.notes, "best": self.best, "inputs": self.inputs,
        }  # fmt: skip
        name = write_verified_file(self.folder, stem, encode_state(tree, about))
        if self.best is not None and self.best["round"] == snapshot.number:
            self.best["file"] = name
        self._last = None
        self._prune(name, snapshot.number)

    def _write_client_states(self, stem: str, states: Mapping[int, ClientState]) -> None:
        """Write the states that have changed: a turn creates new objects."""
        changed = {}
        for client, state in states.items():
            last = self._written.get(client)
            if last is None or last.kept is not state.kept or last.moments is not state.moments:
                changed[client] = state
        tree = states_to_tree(changed)
        name = write_verified_file(self.folder, stem, encode_state(tree, {})) if tree else None
        self._files |= dict.fromkeys(changed, name)
        self._written |= changed

    def _prune(self, newest: str, number: int) -> None:
        """Remove all files but those of the last checkpoints and the best one."""
        states = [path for path in _list_checkpoints(self.folder) if path.name == newest or _number(path) < number]
        kept = {path.name for path in states[-self.settings.keep :]} | ({self.best["file"]} if self.best else set())
        kept |= {str(f) for name in kept for f in (_load_about(self.folder / name).get("private") or {}).values()}
        kept |= {f"{BASE_UPDATES}/{name}" for name, _ in self._base_updates}
        for path in [*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(f"{BASE_UPDATES}/*{SUFFIX}")]:
            if path.relative_to(self.folder).as_posix() not in kept:
                path.unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------- loading
    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is not damaged; None if there is no checkpoint at all.

        Raises ``ValueError`` if there are some, and none of them can be loaded.
        """
        self.refused = []
        for path in reversed(_list_checkpoints(self.folder)):
            try:
                return self._read(path)
            except RefusedFileError as error:
                self.refused.append(str(error))
        run = repr(str(self.folder.parent))
        if not self.refused:
            return None
        if all(FOREIGN in why for why in self.refused):
            raise ValueError(f"{run} {FOREIGN}; go on with the one it began with, or choose another folder.")
        raise ValueError(
            f"{run} holds no checkpoint to go on from: {'; '.join(self.refused)}; choose another folder and run it "
            "anew."
        )

    def check_inputs(self, saved: Checkpoint) -> None:
        """Raise ``ValueError`` if the data or the base differ from those that the checkpoint was made with."""
        compare_inputs(self.folder.parent, saved.about["inputs"], self.inputs)

    def load(self, saved: Checkpoint, f: Federation, engine: Loop) -> ServerState:
        """Return the saved server state; apply its base updates to the model and restore the engine's clients."""
        at, about = engine.begin(f), saved.about
        if about["made"] != self._initial:
            raise ValueError(
                f"{saved.name} was made with other first values of the adapters than this machine draws from the same "
                "seed; go on with the version of torch that the run began with."
            )
        self._base_updates = [(str(name), int(start)) for name, start in about["base_updates"]]
        for base_updates in self._reapply_base_updates(at.base_updates, self._base_updates):
            f.model.fold(base_updates)
            engine.on_base_update(base_updates)
        restore_state(at, saved.tree, about, f.model.device)
        self._written = self.client_states(saved, f) or {}
        self._files = {int(client): name for client, name in (about["private"] or {}).items()}
        best = about["best"]  # without a file if it is this very checkpoint, which cannot contain its own name
        self.best = {"file": saved.name, **best} if best is not None and best["by"] == self.settings.best else None
        engine.restore(f, at, None if about["private"] is None else self._written)
        return at

    def client_states(self, saved: Checkpoint, f: Federation) -> dict[int, ClientState] | None:
        """Return the clients' states of a checkpoint; None if they are on the clients' own machines."""
        files = saved.about["private"]
        if files is None:
            return None
        states = {int(client): ClientState({part: {} for part in f.rules}) for client in files}
        for name in sorted({name for name in files.values() if name is not None}):
            tree, _ = decode_state(read_verified_file(self.folder / name))
            written = states_from_tree(tree, f.rules, f.model.device)
            states |= {client: state for client, state in written.items() if files[str(client)] == name}
        return dict(sorted(states.items()))

    def best_model(self, f: Federation) -> tuple[Tree, dict[int, ClientState], BaseUpdateLog] | None:
        """Return the shared tree, the clients' states and the base updates after the best round."""
        if self.best is None:
            return None
        saved = self._read(self.folder / self.best["file"])
        first = f.model.initial(f.seed)
        at = ServerState(0, first, BaseUpdateLog(), Channel(first, f.heads))
        for _ in self._reapply_base_updates(at.base_updates, saved.about["base_updates"]):
            pass
        restore_state(at, saved.tree, saved.about, f.model.device)
        return at.shared, self.client_states(saved, f) or {}, at.base_updates

    def _reapply_base_updates(self, log: BaseUpdateLog, names: list) -> Iterator[BaseUpdate]:
        """Rebuild a log update by update, summing when the run did, and yield each update."""
        for name, start in names:
            tree, _ = decode_state(read_verified_file(self.folder / BASE_UPDATES / name))
            log.append(base_update_from_tree(tree))
            yield log.entries[-1]
            log.settle(start)

    def _read(self, path: Path) -> Checkpoint:
        """Read a checkpoint and verify all files that belong to it."""
        tree, about = decode_state(read_verified_file(path))
        try:
            if about["form"] != FORM:
                raise RefusedFileError(f"{path.name} was written by another version of fedlora")
            if not isinstance(about["inputs"], dict):
                raise RefusedFileError(f"{path.name} has no digests of its data and model")
            if about["config"] != self.config:
                raise RefusedFileError(f"{path.name} {FOREIGN}")
            for name in sorted({name for name in (about["private"] or {}).values() if name is not None}):
                read_verified_file(self.folder / safe_filename(name, "a file of a checkpoint"))
            for name, _ in about["base_updates"]:
                read_verified_file(self.folder / BASE_UPDATES / safe_filename(name, "a file of a checkpoint"))
        except RefusedFileError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RefusedFileError(f"{path.name} lacks values of a checkpoint") from error
        return Checkpoint(path.name, about, tree)


def check_run_inputs(run: Path, f: Federation) -> None:
    """Raise ``ValueError`` if the data or base of a run have changed since its start, or no checkpoint records them.

    ``f`` is its federation, before any base update. The folder of the best round shares the checkpoints of its run.
    """
    for folder in (run / FOLDER, run.absolute().parent / FOLDER):
        for path in reversed(_list_checkpoints(folder)):
            before = _load_about(path).get("inputs")
            if isinstance(before, dict):
                return compare_inputs(run, before, digest_inputs(f))
    raise ValueError(
        f"{str(run)!r} has no {FOLDER} with digests of its data and model, so nothing shows that they are the same "
        "now; copy them from the run's machine, or run it anew."
    )


def _load_about(path: Path) -> dict[str, Any]:
    """Read the plain values of a checkpoint, unverified; empty if it cannot be read."""
    try:
        return load_about(path)
    except ValueError:
        return {}


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(STATES), key=lambda path: (_number(path), path.stat().st_mtime_ns))


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def config_digest(table: Mapping[str, Any]) -> str:
    """Return a digest of all settings that decide a run's bits, without those of a machine and the number of rounds.

    The paths and names of data and model are left out, too, because their content is compared, and so are the names of
    Python objects.
    """
    free = ("engine", "flower", "checkpoint", "track", *(["rounds"] if is_extendable(table) else []))
    left = {key: value for key, value in table.items() if key not in free}
    left = _without_paths(left)
    if "party" in left:
        left["party"] = [{k: v for k, v in _without_paths(party).items() if k != "file"} for party in left["party"]]
    return hashlib.blake2b(json.dumps(left, sort_keys=True).encode(), digest_size=16).hexdigest()


def _without_paths(table: Mapping[str, Any]) -> dict[str, Any]:
    left = dict(table)
    for section, name in (setting.split(".") for setting in (*PATHS, "model.same_base")):
        left |= {section: {k: v for k, v in left[section].items() if k != name}} if section in left else {}
    if "objects" in left.get("task", {}):  # names of functions and classes, as "module:name", may change
        named = {k: v for k, v in left["task"]["objects"].items() if ":" not in v}
        left["task"] = {**left["task"], "objects": named}
    return left


def is_extendable(table: Mapping[str, Any]) -> bool:
    """Whether a run's first rounds are independent of its length; with a schedule or a target of ε they are not."""
    training = table.get("training", {})
    flat = training.get("schedule", "constant") == "constant" and not training.get("warmup")
    return flat and "target_epsilon" not in table.get("privacy", {})
