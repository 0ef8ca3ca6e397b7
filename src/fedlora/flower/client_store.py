"""What a party keeps on its own disk between messages: its private state, the leaves it was sent, the folds.

One file a party, replaced whole, mode 0600 in a folder of mode 0700. A turn's outcome is kept beside the state before
it until the server says whether the upload counted: a reply that was lost, late or refused leaves no trace, and a
round that is run again after a crash starts from what it started from.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.engines.base_updates import Folds, folds_from_tree, folds_to_tree
from fedlora.engines.snapshot import moment_layers, moments_of
from fedlora.files import encode_tree, load_about, load_tree, save_json, save_tree, write
from fedlora.security.privacy import key_of
from fedlora.training.local import State
from fedlora.types import Tree

NAME = re.compile(r"[0-9a-f]{32}")  # of a fold's file: nothing else becomes a path
TOLD = ("pending", "counted", "folds", "folded", "base")
PARTS = ("leaves", "kept", "trained", "moments", "trained_moments")


@dataclass(frozen=True)
class Holding:
    """A party's state. ``trained`` is the outcome of its turn in round ``pending``, which may not have counted."""

    leaves: Tree = field(default_factory=dict)  # as sent by the server, where they differ from what the seed gives
    kept: Tree = field(default_factory=dict)
    moments: State | None = None
    trained: Tree = field(default_factory=dict)
    trained_moments: State | None = None
    pending: int = -1
    counted: int = -1  # the last round that this party's upload went into, as the server last said
    folds: tuple[str, ...] = ()  # names of the fold files, in order; together they are ``folded`` folds
    folded: int = 0
    base: str = ""  # the server's name for the base with these folds in it

    def settled(self, counted: int) -> "Holding":
        """With the pending turn taken over if its upload counted, and dropped if not."""
        done = replace(self, trained={}, trained_moments=None, pending=-1)
        if self.pending < 0 or counted != self.pending:
            return done
        return replace(done, kept=self.trained, moments=self.trained_moments)


@dataclass(frozen=True)
class Store:
    """A folder with ``clients/K.safetensors`` and ``folds/NAME.safetensors``; parties in one folder share the folds.

    ``clients/K.rows.json`` has the digests of the rows that the party began the run with; they never leave this disk.

    A fold file's name is its content's digest, so the same fold is there once.
    """

    folder: Path

    def __post_init__(self):
        for folder in (self.folder, self.folder / "clients", self.folder / "folds"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(self, client: int) -> Holding:
        """The party's state, or an empty one. ``ValueError`` where the file is broken."""
        path = self._path(client)
        if not path.exists():
            return Holding()
        groups: dict[str, dict] = {name: {} for name in PARTS}
        for key, layer in load_tree(path).items():
            name, _, part = key.partition("/")
            groups.setdefault(name, {})[part] = layer
        about = load_about(path)
        if groups.keys() != set(PARTS) or about.keys() != set(TOLD) or not all(map(NAME.fullmatch, about["folds"])):
            raise ValueError(f"{str(path)!r} holds no state of a party, it was edited; remove the run's folder.")
        moments = {name: moments_of(groups.pop(name)) for name in ("moments", "trained_moments")}
        return Holding(**groups, **moments, **{**about, "folds": tuple(about["folds"])})

    def save(self, client: int, holding: Holding) -> None:
        """Replaces the party's state; a crash leaves the old one."""
        tree: dict[str, Mapping] = {}
        for name in PARTS:
            value = getattr(holding, name) or {}
            layers = moment_layers(value) if name.endswith("moments") else value
            tree |= {f"{name}/{part}": layer for part, layer in layers.items() if layer}
        about = {name: getattr(holding, name) for name in TOLD}
        save_tree(self._path(client), tree, {"about": json.dumps(about)})

    def secret(self, client: int) -> Path:
        """Where its side of a secure aggregation lies between two messages."""
        return self.folder / "clients" / f"{client}.secret"

    def key(self, client: int) -> bytes:
        """What the party's draws for privacy come from in this run: a turn that is asked for twice is noised alike."""
        path = self.folder / "clients" / f"{client}.key"
        if not path.exists():
            write(path, key_of(None))
        return path.read_bytes()

    def rows(self, client: int) -> dict[str, Any] | None:
        """What ``save_rows`` wrote; None before the party's first turn. ``ValueError`` where the file is broken."""
        path = self._rows(client)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no table")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{str(path)!r} does not say which rows this party began the run with, it was edited ({error}); remove "
                "the run's folder."
            ) from error
        return found

    def save_rows(self, client: int, rows: Mapping[str, Any]) -> None:
        """Keeps the digests of the party's rows, as ``inputs.rows`` makes them."""
        save_json(self._rows(client), rows)

    def add(self, folds: Folds) -> str:
        """Writes one round's folds, and returns their name."""
        content = encode_tree(folds_to_tree(folds))
        name = hashlib.blake2b(content, digest_size=16).hexdigest()
        if not self._fold(name).exists():
            write(self._fold(name), content)
        return name

    def fold(self, name: str) -> Folds:
        """The folds of that name."""
        return folds_from_tree(load_tree(self._fold(name)))

    def _rows(self, client: int) -> Path:
        return self.folder / "clients" / f"{client}.rows.json"

    def _path(self, client: int) -> Path:
        return self.folder / "clients" / f"{client}.safetensors"

    def _fold(self, name: str) -> Path:
        return self.folder / "folds" / f"{name}.safetensors"
