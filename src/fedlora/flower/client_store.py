"""A client's storage on its own disk between messages: private state, received leaves, base updates.

Each client has one file, which is replaced as a whole, with mode 0600 in a folder of mode 0700. The result of a turn is
stored beside the state before it until the server reports whether the upload counted. So a reply that was lost, late or
refused has no effect, and a round that is repeated after a crash starts from the same state.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
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
from fedlora.runs.folder import read_json
from fedlora.security.privacy import key_of
from fedlora.training.local import OptimizerState
from fedlora.types import Tree

NAME = re.compile(r"[0-9a-f]{32}")  # of a base update's file; no other text becomes a path
VALUES = ("pending", "counted", "base_updates", "base_updates_held", "base")
PARTS = ("leaves", "kept", "trained", "moments", "trained_moments")


@dataclass(frozen=True)
class StoredState:
    """A client's state. ``trained`` is the result of its turn in round ``pending``, which may not have counted."""

    leaves: Tree = field(default_factory=dict)  # received leaves that differ from the initial ones
    kept: Tree = field(default_factory=dict)
    moments: OptimizerState | None = None
    trained: Tree = field(default_factory=dict)
    trained_moments: OptimizerState | None = None
    pending: int = -1
    counted: int = -1  # the last round whose result includes an upload of this client, as the server last reported
    base_updates: tuple[str, ...] = ()  # names of their files, in order
    base_updates_held: int = 0
    base: str = ""  # the server's name for the base with these base updates

    def resolve_pending(self, counted: int) -> "StoredState":
        """Adopt the pending turn if its upload counted, and discard it otherwise."""
        done = replace(self, trained={}, trained_moments=None, pending=-1)
        if self.pending < 0 or counted != self.pending:
            return done
        return replace(done, kept=self.trained, moments=self.trained_moments)


@dataclass(frozen=True)
class ClientStore:
    """A folder with ``clients/K.safetensors`` and ``base_updates/NAME.safetensors``.

    Clients in one folder share the base updates. The name of a base update's file is the digest of its content.
    ``clients/K.rows.json`` has digests of the rows that the client began the run with; they never leave this disk.
    """

    folder: Path

    def __post_init__(self):
        for folder in (self.folder, self.folder / "clients", self.folder / "base_updates"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, client: int, ending: str = "safetensors") -> Path:
        """Return a client's file. With ``ending="secret"``: its side of a secure aggregation between two messages."""
        return self.folder / "clients" / f"{client}.{ending}"

    def load(self, client: int) -> StoredState:
        """Return the client's state, or an empty one. Raises ``ValueError`` if the file is broken."""
        path = self.path(client)
        if not path.exists():
            return StoredState()
        groups: dict[str, dict] = {name: {} for name in PARTS}
        for key, layer in load_tree(path).items():
            name, _, part = key.partition("/")
            groups.setdefault(name, {})[part] = layer
        about = load_about(path)
        is_whole = groups.keys() == set(PARTS) and about.keys() == set(VALUES)
        if not is_whole or not all(map(NAME.fullmatch, about["base_updates"])):
            raise ValueError(f"{str(path)!r} holds no state of a client, it was edited; remove the run's folder.")
        moments = {name: moments_of(groups.pop(name)) for name in ("moments", "trained_moments")}
        return StoredState(**groups, **moments, **{**about, "base_updates": tuple(about["base_updates"])})

    def save(self, client: int, state: StoredState) -> None:
        """Replace the client's state; a crash leaves the old one."""
        tree: dict[str, Mapping] = {}
        for name in PARTS:
            value = getattr(state, name) or {}
            layers = moment_layers(value) if name.endswith("moments") else value
            tree |= {f"{name}/{part}": layer for part, layer in layers.items() if layer}
        save_tree(self.path(client), tree, {"about": json.dumps({name: getattr(state, name) for name in VALUES})})

    def key(self, client: int) -> bytes:
        """Return the key of the client's privacy noise in this run: a repeated turn gets the same noise."""
        path = self.path(client, "key")
        if not path.exists():
            write(path, key_of(None))
        return path.read_bytes()

    def load_rows(self, client: int) -> dict[str, Any] | None:
        """Return the table of ``save_rows``, or None before the client's first turn.

        Raises ``ValueError`` if the file is broken.
        """
        path = self.path(client, "rows.json")
        if not path.exists():
            return None
        try:
            return read_json(path)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"it is unknown with which rows this client began the run: {error} Remove the run's folder."
            ) from error

    def save_rows(self, client: int, rows: Mapping[str, Any]) -> None:
        """Save the digests of the client's rows, as returned by ``inputs.rows``."""
        save_json(self.path(client, "rows.json"), rows)

    def add_base_update(self, base_update: BaseUpdate) -> str:
        """Write one round's base update, and return its name."""
        content = encode_tree(base_update_to_tree(base_update))
        name = hashlib.blake2b(content, digest_size=16).hexdigest()
        if not (path := self._base_update_path(name)).exists():
            write(path, content)
        return name

    def load_base_update(self, name: str) -> BaseUpdate:
        """Return the base update of that name."""
        return base_update_from_tree(load_tree(self._base_update_path(name)))

    def _base_update_path(self, name: str) -> Path:
        return self.folder / "base_updates" / f"{name}.safetensors"


def select_leaves(rules: Rules, shared: Tree, rank: int) -> dict[str, dict[str, Tensor]]:
    """Return the trainable leaves of the server's tree as a client of this rank holds them."""
    leaves = {}
    for part, rule in rules.items():
        layer = rule.adapter.leading(public_leaves(shared[part]), rank)
        leaves[part] = dict(pick(layer, rule.adapter.trainable & set(layer)))
    return leaves


def name_base(before: str, base_update: BaseUpdate) -> str:
    """Return a unique name for the base after one more base update; ``before`` is its name before that."""
    return digest({"before": {before: torch.zeros(0)}, **base_update_to_tree(base_update)})


@dataclass
class LocalClients:
    """The clients of a run that all have their state on this machine, as in a simulation.

    On resume, their states are restored from the run's checkpoint.
    """

    store: ClientStore
    _base_updates: list[str] = field(default_factory=list)
    _states: dict[int, tuple[int, ClientState]] = field(default_factory=dict)  # client -> last counted round, state

    def client_states(self, at: ServerState) -> dict[int, ClientState]:
        """Return each client's private state after the last round that includes its upload."""
        for client, number in at.counted.items():
            if self._states.get(client, (-1, None))[0] != number:
                stored = self.store.load(client).resolve_pending(number)
                self._states[client] = number, ClientState(stored.kept, stored.moments)
        return {client: self._states[client][1] for client in sorted(at.counted)}

    def add_base_update(self, base_update: BaseUpdate) -> None:
        """Store a base update that clients hold or will receive."""
        self._base_updates.append(self.store.add_base_update(base_update))

    def restore(self, f: Federation, at: ServerState, states: Mapping[int, ClientState], bases: Sequence[str]) -> None:
        """Give each client the state that the server knows of; missing leaves are sent before they are used.

        ``bases[n]`` is the name of the base after ``n`` base updates.
        """
        for client in range(f.clients.members):
            state = states.get(client, ClientState({}))
            seen = at.channel.count_base_updates(client)
            leaves = select_leaves(f.rules, at.shared, f.budgets[client]) if at.channel.is_known(client) else {}
            counted = at.counted.get(client, -1)
            self.store.save(
                client,
                StoredState(
                    leaves, state.kept, state.moments, counted=counted, base_updates=tuple(self._base_updates[:seen]),
                    base_updates_held=seen, base=bases[seen],
                ),
            )  # fmt: skip
            self._states[client] = counted, state
