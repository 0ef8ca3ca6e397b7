"""A run's checkpoints: written after its rounds, each whole or not at all, and found again when it goes on.

A folder holds ``NUMBER-DIGEST.safetensors`` (the server's state after so many rounds, and which other files belong to
it), ``private-NUMBER-DIGEST.safetensors`` (what clients keep that trained since the one before) and
``folds/NUMBER-DIGEST.safetensors`` (one round's folds). Every file is written once; the state comes last, so a crash
anywhere leaves the checkpoint before.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.engines.base_updates import FoldLog, Folds, folds_from_tree, folds_to_tree
from fedlora.engines.comm.channel import Channel
from fedlora.engines.federation import Federation
from fedlora.engines.inputs import compare_inputs, inputs
from fedlora.engines.loop import Loop, Private, Round, Standing
from fedlora.engines.retention import Retention
from fedlora.engines.snapshot import Snapshot, private_leaves, privates_of, put_back
from fedlora.engines.verified_files import (
    ENDING,
    RefusedError,
    decode_state,
    encode_state,
    read_about,
    read_verified,
    write_verified,
)
from fedlora.files import digest, swept
from fedlora.text import plain_name
from fedlora.types import Tree

FOLDER, FOLDS, FORM = "checkpoints", "folds", 2
PLACES = ("task.data", "model.name", "model.start")  # settings that say where a file or a folder is
FOREIGN = "holds a run of another configuration"
STATES = f"[0-9]*-{'[0-9a-f]' * 32}{ENDING}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found sound, with all that belongs to it."""

    name: str
    about: Mapping[str, Any]
    tree: Tree = field(repr=False)

    @property
    def number(self) -> int:
        """Rounds that it counts."""
        return int(self.about["plain"]["number"])


@dataclass
class Checkpoints:
    """The folder of one run. ``refused`` says of each checkpoint that was not taken why."""

    folder: Path
    config: str  # a digest of the configuration: another one cannot go on from here
    metric: str  # of the task
    retention: Retention = field(default_factory=Retention)
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of the rows and the base, as ``inputs`` makes them
    notes: dict[str, Any] = field(default_factory=dict)  # plain values that go with the run: seconds, where it went on
    refused: list[str] = field(default_factory=list, init=False)
    best: dict[str, Any] | None = field(default=None, init=False)  # round, value, and the file's name
    _made: str = field(default="", init=False)  # a digest of what every party makes from the seed
    _folds: list[tuple[str, int]] = field(default_factory=list, init=False)  # file, and how many were settled then
    _files: dict[int, str | None] = field(default_factory=dict, init=False)  # client -> where what it keeps is
    _written: dict[int, Private] = field(default_factory=dict, init=False)
    _last: Snapshot | None = field(default=None, init=False)  # of the last round, if that is not on disk

    # ------------------------------------------------------------------------------------ saving
    def begin(self, f: Federation) -> None:
        """Before the first round, or before a run goes on."""
        self._made = digest({part: layer for part, layer in f.model.initial(f.seed).items() if layer})
        for folder in (self.folder, self.folder / FOLDS):
            swept(folder)

    def after(self, done: Round, engine: Loop, last: bool) -> None:
        """A round is over: its folds are written, and its state where that is due."""
        self._fold(done.folds)
        self._last = Snapshot.take(done.standing, engine.privates(done.standing))
        value = self.retention.value(done.record, self.metric)
        better = self.retention.better(value, self.best and self.best["value"], self.metric)
        if better:
            self.best = {"round": self._last.number, "by": self.retention.best, "value": value}
        if last or better or self._last.number % self.retention.every == 0:
            self.save()

    def save(self) -> None:
        """The last finished round, if it is not on disk yet."""
        snapshot = self._last
        if snapshot is None:
            return
        stem = f"{snapshot.number:06d}"
        self._private(f"private-{stem}", snapshot)
        tree, said = snapshot.leaves()
        files = None if snapshot.privates is None else self._files
        own = {
            "form": FORM, "config": self.config, "made": self._made, "folds": self._folds, "private": files,
            "notes": self.notes, "best": self.best, "inputs": self.inputs,
        }  # fmt: skip
        name = write_verified(self.folder, stem, encode_state(tree, {**said, **own}))
        if self.best is not None and self.best["round"] == snapshot.number:
            self.best["file"] = name
        self._last = None
        self._prune(name, snapshot.number)

    def _fold(self, log: FoldLog) -> None:
        """Each round's folds are on disk before they are summed with others."""
        for number in range(len(self._folds), len(log)):
            content = encode_state(folds_to_tree(log.entries[number - log.start]), {})
            name = write_verified(self.folder / FOLDS, f"{number:06d}", content)
            self._folds.append((name, log.start))

    def _private(self, stem: str, snapshot: Snapshot) -> None:
        found = snapshot.privates or {}
        fresh = {client: own for client, own in found.items() if not _same(self._written.get(client), own)}
        tree = private_leaves(fresh)
        name = write_verified(self.folder, stem, encode_state(tree, {})) if tree else None
        self._files |= dict.fromkeys(fresh, name)
        self._written |= fresh

    def _prune(self, newest: str, number: int) -> None:
        """Removes what is neither among the last, nor the best, nor belongs to them."""
        found = [path for path in _states(self.folder) if path.name == newest or _number(path) < number]
        kept = {path.name for path in found[-self.retention.keep :]}
        kept |= {self.best["file"]} if self.best else set()
        belong = {str(f) for name in kept for f in (read_about(self.folder / name).get("private") or {}).values()}
        for path in self.folder.glob(f"*{ENDING}"):
            if path.name not in kept | belong:
                path.unlink(missing_ok=True)
        current = {name for name, _ in self._folds}
        for path in (self.folder / FOLDS).glob(f"*{ENDING}"):
            if path.name not in current:
                path.unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------- finding
    def newest(self) -> Saved | None:
        """The newest sound checkpoint; None where there is none at all.

        ``ValueError`` where there are some and none of them will do.
        """
        self.refused = []
        for path in reversed(_states(self.folder)):
            try:
                return self._sound(path)
            except RefusedError as error:
                self.refused.append(str(error))
        run = repr(str(self.folder.parent))
        if self.refused and all(FOREIGN in why for why in self.refused):
            raise ValueError(f"{run} {FOREIGN}; go on with the one it began with, or choose another folder.")
        if self.refused:
            raise ValueError(
                f"{run} holds no checkpoint to go on from: {'; '.join(self.refused)}; choose another folder and run it "
                "anew."
            )
        return None

    def check_inputs(self, saved: Saved) -> None:
        """``ValueError`` where the data or the base are not those that the checkpoint was made with; says how."""
        compare_inputs(self.folder.parent, saved.about["inputs"], self.inputs)

    def load(self, saved: Saved, f: Federation, engine: Loop) -> Standing:
        """The standing that was saved, its folds in the model's base, and the engine's clients with what they keep."""
        at, said = engine.begin(f), saved.about
        if said["made"] != self._made:
            raise ValueError(
                f"{saved.name} was made with other first values of the adapters than this machine draws from the same "
                "seed; go on with the version of torch that the run began with."
            )
        self._folds = [(str(name), int(start)) for name, start in said["folds"]]
        for folds in self._refold(at.folds, self._folds):
            f.model.fold(folds)
            engine.refolded(folds)
        put_back(at, saved.tree, said, f.model.device)
        self._written = self.privates(saved, f) or {}
        self._files = {int(client): name for client, name in (said["private"] or {}).items()}
        self.best = said["best"]
        if self.best is not None and self.best["by"] != self.retention.best:
            self.best = None
        if self.best is not None:
            self.best.setdefault("file", saved.name)  # it was written before it knew its own name
        engine.resumed(f, at, None if said["private"] is None else self._written)
        return at

    def privates(self, saved: Saved, f: Federation) -> dict[int, Private] | None:
        """What each client kept then; None where that is on the parties' own machines."""
        files = saved.about["private"]
        if files is None:
            return None
        found: dict[int, Private] = {int(client): Private({part: {} for part in f.rules}) for client in files}
        for name in sorted({name for name in files.values() if name is not None}):
            tree, _ = decode_state(read_verified(self.folder / name))
            own = privates_of(tree, f.rules, f.model.device)
            found |= {client: private for client, private in own.items() if files[str(client)] == name}
        return dict(sorted(found.items()))

    def best_model(self, f: Federation) -> tuple[Tree, dict[int, Private], FoldLog] | None:
        """What the best round ended with: the shared tree, what clients kept, the folds so far."""
        if self.best is None:
            return None
        saved = self._sound(self.folder / self.best["file"])
        first = f.model.initial(f.seed)
        at = Standing(0, first, FoldLog(), Channel(first, f.heads))
        for _ in self._refold(at.folds, saved.about["folds"]):
            pass
        put_back(at, saved.tree, saved.about, f.model.device)
        return at.shared, self.privates(saved, f) or {}, at.folds

    def _refold(self, log: FoldLog, names: list) -> Iterator[Folds]:
        """Lets a log grow as it once did, fold by fold."""
        for name, start in names:
            tree, _ = decode_state(read_verified(self.folder / FOLDS / name))
            log.append(folds_from_tree(tree))
            yield log.entries[-1]
            log.settle(start)

    def _sound(self, path: Path) -> Saved:
        """The checkpoint of a file, if it and all that belongs to it are as they were written."""
        tree, said = decode_state(read_verified(path))
        try:
            if said["form"] != FORM:
                raise RefusedError(f"{path.name} was written by another version of fedlora")
            if not isinstance(said["inputs"], dict):
                raise RefusedError(f"{path.name} does not say what it was begun with")
            if said["config"] != self.config:
                raise RefusedError(f"{path.name} {FOREIGN}")
            for name in sorted({name for name in (said["private"] or {}).values() if name is not None}):
                read_verified(self.folder / plain_name(name, "a file of a checkpoint"))
            for name, _ in said["folds"]:
                read_verified(self.folder / FOLDS / plain_name(name, "a file of a checkpoint"))
        except RefusedError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RefusedError(f"{path.name} does not say what a checkpoint says") from error
        return Saved(path.name, said, tree)


def check_unchanged(run: Path, f: Federation) -> None:
    """``ValueError`` where a run's data or base are not those that it was begun with, or where nothing says so.

    ``f`` is its federation, before anything is folded into the base. The best round's folder in a run's folder is of
    the same data as the run.
    """
    for place in (run / FOLDER, run.absolute().parent / FOLDER):
        for path in reversed(_states(place)):
            before = read_about(path).get("inputs")
            if isinstance(before, dict):
                return compare_inputs(run, before, inputs(f))
    raise ValueError(
        f"{str(run)!r} has no {FOLDER} that say which data and which model it was begun with, so nothing shows that "
        "they are the same now; copy them there from where the run was made, or run it anew."
    )


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob(STATES), key=lambda path: (_number(path), path.stat().st_mtime_ns))


def _same(a: Private | None, b: Private) -> bool:
    """Whether these are the very objects: a turn makes new ones."""
    return a is not None and a.kept is b.kept and a.moments is b.moments


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def config_digest(table: Mapping[str, Any]) -> str:
    """Of all that decides a run's bits: not of the machine's own settings, nor of how long the run is.

    Where data and model are and what they are called is left out, too: what they hold is compared by itself.
    """
    free = ("engine", "flower", "checkpoint", "track", *(["rounds"] if endless(table) else []))
    left = {key: value for key, value in table.items() if key not in free}
    for section, name in (place.split(".") for place in (*PLACES, "model.same_base")):
        left |= {section: {k: v for k, v in left[section].items() if k != name}} if section in left else {}
    return hashlib.blake2b(json.dumps(left, sort_keys=True).encode(), digest_size=16).hexdigest()


def endless(table: Mapping[str, Any]) -> bool:
    """Whether a run's beginning is the same however long it is: a schedule, or noise for a target, is over all."""
    training = table.get("training", {})
    flat = training.get("schedule", "constant") == "constant" and not training.get("warmup")
    return flat and "target_epsilon" not in table.get("privacy", {})
