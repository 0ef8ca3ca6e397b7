"""A client's own disk between messages: its private state, the leaves it was sent, the base updates.

One file a client, replaced whole, mode 0600 in a folder of mode 0700. A turn's outcome is kept beside the state before
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

import torch
from torch import Tensor

from fedlora.engines.base_updates import BaseUpdate, base_update_from_tree, base_update_to_tree
from fedlora.engines.federation import Federation
from fedlora.engines.loop import ClientState, ServerState
from fedlora.engines.snapshot import moment_layers, moments_of
from fedlora.files import digest, encode_tree, load_about, load_tree, save_json, save_tree, write
from fedlora.methods._base import pick
from fedlora.rounds import Rules, public_leaves
from fedlora.security.privacy import key_of
from fedlora.training.local import State
from fedlora.types import Tree

NAME = re.compile(r"[0-9a-f]{32}")  # of a fold's file: nothing else becomes a path
VALUES = ("pending", "counted", "base_updates", "base_updates_held", "base")
PARTS = ("leaves", "kept", "trained", "moments", "trained_moments")


@dataclass(frozen=True)
class StoredState:
    """A client's state. ``trained`` is the outcome of its turn in round ``pending``, which may not have counted."""

    leaves: Tree = field(default_factory=dict)  # as sent by the server, where they differ from what the seed gives
    kept: Tree = field(default_factory=dict)
    moments: State | None = None
    trained: Tree = field(default_factory=dict)
    trained_moments: State | None = None
    pending: int = -1
    counted: int = -1  # the last round that this client's upload went into, as the server last said
    base_updates: tuple[str, ...] = ()  # names of their files, in order
    base_updates_held: int = 0
    base: str = ""  # the server's name for the base with these base updates in it

    def resolve_pending(self, counted: int) -> "StoredState":
        """Takes over the pending turn if its upload counted, and drops it if not."""
        done = replace(self, trained={}, trained_moments=None, pending=-1)
        if self.pending < 0 or counted != self.pending:
            return done
        return replace(done, kept=self.trained, moments=self.trained_moments)


@dataclass(frozen=True)
class ClientStore:
    """A folder with ``clients/K.safetensors`` and ``base_updates/NAME.safetensors``; clients in one folder
    share the base updates.

    ``clients/K.rows.json`` has the digests of the rows that the client began the run with; they never leave this disk.

    A fold file's name is its content's digest, so the same fold is there once.
    """

    folder: Path

    def __post_init__(self):
        for folder in (self.folder, self.folder / "clients", self.folder / "base_updates"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(self, client: int) -> StoredState:
        """The client's state, or an empty one. ``ValueError`` where the file is broken."""
        path = self._path(client)
        if not path.exists():
            return StoredState()
        groups: dict[str, dict] = {name: {} for name in PARTS}
        for key, layer in load_tree(path).items():
            name, _, part = key.partition("/")
            groups.setdefault(name, {})[part] = layer
        about = load_about(path)
        if (
            groups.keys() != set(PARTS)
            or about.keys() != set(VALUES)
            or not all(map(NAME.fullmatch, about["base_updates"]))
        ):
            raise ValueError(f"{str(path)!r} holds no state of a client, it was edited; remove the run's folder.")
        moments = {name: moments_of(groups.pop(name)) for name in ("moments", "trained_moments")}
        return StoredState(**groups, **moments, **{**about, "base_updates": tuple(about["base_updates"])})

    def save(self, client: int, holding: StoredState) -> None:
        """Replaces the client's state; a crash leaves the old one."""
        tree: dict[str, Mapping] = {}
        for name in PARTS:
            value = getattr(holding, name) or {}
            layers = moment_layers(value) if name.endswith("moments") else value
            tree |= {f"{name}/{part}": layer for part, layer in layers.items() if layer}
        about = {name: getattr(holding, name) for name in VALUES}
        save_tree(self._path(client), tree, {"about": json.dumps(about)})

    def secret_path(self, client: int) -> Path:
        """The file with the client's side of a secure aggregation between two messages."""
        return self.folder / "clients" / f"{client}.secret"

    def key(self, client: int) -> bytes:
        """The key of the client's draws for privacy in this run: a turn that is asked for twice gets the same noise."""
        path = self.folder / "clients" / f"{client}.key"
        if not path.exists():
            write(path, key_of(None))
        return path.read_bytes()

    def load_rows(self, client: int) -> dict[str, Any] | None:
        """What ``save_rows`` wrote; None before the client's first turn. ``ValueError`` where the file is broken."""
        path = self._rows_path(client)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no table")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{str(path)!r} does not say which rows this client began the run with, it was edited ({error}); "
                "remove the run's folder."
            ) from error
        return found

    def save_rows(self, client: int, rows: Mapping[str, Any]) -> None:
        """Keeps the digests of the client's rows, as ``inputs.rows`` makes them."""
        save_json(self._rows_path(client), rows)

    def add_base_update(self, base_updates: BaseUpdate) -> str:
        """Writes one round's base updates, and returns their name."""
        content = encode_tree(base_update_to_tree(base_updates))
        name = hashlib.blake2b(content, digest_size=16).hexdigest()
        if not self._base_update_path(name).exists():
            write(self._base_update_path(name), content)
        return name

    def load_base_update(self, name: str) -> BaseUpdate:
        """The base updates of that name."""
        return base_update_from_tree(load_tree(self._base_update_path(name)))

    def _rows_path(self, client: int) -> Path:
        return self.folder / "clients" / f"{client}.rows.json"

    def _path(self, client: int) -> Path:
        return self.folder / "clients" / f"{client}.safetensors"

    def _base_update_path(self, name: str) -> Path:
        return self.folder / "base_updates" / f"{name}.safetensors"


def select_leaves(rules: Rules, shared: Tree, rank: int) -> dict[str, dict[str, Tensor]]:
    """The trainable leaves of the server's tree as a client of this rank holds them."""
    found = {}
    for part, rule in rules.items():
        layer = rule.adapter.leading(public_leaves(shared[part]), rank)
        found[part] = dict(pick(layer, rule.adapter.trainable & set(layer)))
    return found


@dataclass
class BaseNames:
    """A name for the base after each fold, which no other base updates have."""

    names: list[str] = field(default_factory=lambda: [""])  # number of base updates -> the base's name

    def add(self, base_updates: BaseUpdate) -> None:
        """Names the base after one more round's base updates."""
        self.names.append(digest({"before": {self.names[-1]: torch.zeros(0)}, **base_update_to_tree(base_updates)}))

    def __getitem__(self, number: int) -> str:
        return self.names[number]


@dataclass
class LocalClients:
    """The clients of a run whose state is all on this machine, as in a simulation.

    A run goes on from what its checkpoint says of them.
    """

    store: ClientStore
    _base_updates: list[str] = field(default_factory=list)
    _read: dict[int, tuple[int, ClientState]] = field(default_factory=dict)

    def client_states(self, at: ServerState) -> dict[int, ClientState]:
        """Each client's private state after the last round that its upload went into."""
        for client, number in at.counted.items():
            if self._read.get(client, (-1, None))[0] != number:
                held = self.store.load(client).resolve_pending(number)
                self._read[client] = number, ClientState(held.kept, held.moments)
        return {client: self._read[client][1] for client in sorted(at.counted)}

    def add_base_update(self, base_updates: BaseUpdate) -> None:
        """Adds base updates that clients hold, or will be sent."""
        self._base_updates.append(self.store.add_base_update(base_updates))

    def restore(self, f: Federation, at: ServerState, states: Mapping[int, ClientState], bases: BaseNames) -> None:
        """Gives each client what it is known to hold; leaves that it lacks are sent before they are looked at."""
        for client in range(f.clients.members):
            own = states.get(client, ClientState({}))
            seen = at.channel.count_base_updates(client)
            leaves = select_leaves(f.rules, at.shared, f.budgets[client]) if at.channel.is_known(client) else {}
            counted = at.counted.get(client, -1)
            self.store.save(
                client,
                StoredState(
                    leaves, own.kept, own.moments, counted=counted, base_updates=tuple(self._base_updates[:seen]),
                    base_updates_held=seen, base=bases[seen],
                ),
            )  # fmt: skip
            self._read[client] = counted, own
