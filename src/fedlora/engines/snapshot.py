"""The server state between two rounds: as references that no later round changes, as leaves on disk, and back.

All draws of a run depend on its seed and the round's number, so there is no state of a generator.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fedlora.engines.client_turn import ClientState
from fedlora.engines.comm.channel import Knowledge, Transfer
from fedlora.engines.loop import ServerState
from fedlora.training.local import OptimizerState
from fedlora.types import Tree

LEAVES = ("shared", "base_updates", "channel", "overheard")  # fields of a server state that are not plain values


@dataclass(frozen=True)
class Snapshot:
    """A server state at one moment. Hooks are pure, so references to the leaves are enough."""

    shared: Tree
    plain: Mapping[str, Any]  # the other fields of the server state
    knowledge: Knowledge
    ledger: list[Transfer]
    states: Mapping[int, ClientState] | None  # None: they are on the clients' own machines
    overheard: Mapping[int, Tree]

    @classmethod
    def take(cls, at: ServerState, states: Mapping[int, ClientState] | None) -> "Snapshot":
        """Take a snapshot of everything that the next round depends on."""
        plain = deepcopy({f.name: getattr(at, f.name) for f in fields(at) if f.name not in LEAVES})
        known, ledger = at.channel.knowledge(at.shared), list(at.channel.ledger)
        return cls(at.shared, plain, known, ledger, None if states is None else dict(states), dict(at.overheard))

    @property
    def number(self) -> int:
        """The number of finished rounds."""
        return int(self.plain["number"])

    def leaves(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Return a tree and plain values. Leaves that still have their initial values are only named."""
        versions = self.knowledge.versions
        changed = {
            f"shared/{part}": {leaf: x for leaf, x in layer.items() if versions.get((part, leaf), 1)}
            for part, layer in self.shared.items()
        }
        keys = list(versions)
        table: dict[tuple[int, ...], int] = {}  # clients with the same versions share a row
        known = {client: tuple(own.get(key, 0) for key in keys) for client, own in self.knowledge.held.items()}
        rows = {client: table.setdefault(row, len(table)) for client, row in known.items()}
        held = torch.tensor(list(table), dtype=torch.int64).reshape(len(table), len(keys))
        ledger, words = _ledger_table(self.ledger)
        numbers = {"versions": torch.tensor(list(versions.values())), "held": held, "ledger": ledger}
        about = {
            "plain": self.plain, "leaves": {part: list(layer) for part, layer in self.shared.items()},
            "keys": keys, "held": rows, "folds_seen": self.knowledge.base_update_counts, "words": words,
            "overheard": list(self.overheard),
        }  # fmt: skip
        heard = {f"overheard/{k}/{part}": layer for k, tree in self.overheard.items() for part, layer in tree.items()}
        return {**changed, **heard, "numbers": numbers}, about


def restore_state(at: ServerState, tree: Tree, about: Mapping[str, Any], device: torch.device) -> None:
    """Set a fresh server state to the leaves and plain values of a snapshot, except for the base updates."""
    saved = _to_device({p.removeprefix("shared/"): x for p, x in tree.items() if p != "numbers"}, device)
    initial = at.shared
    # A leaf with its initial values stays the same object, so it is not sent again.
    at.shared = {
        part: {leaf: saved[part][leaf] if leaf in saved.get(part, ()) else initial[part][leaf] for leaf in leaves}
        for part, leaves in about["leaves"].items()
    }
    at.overheard = {
        client: {part: saved.get(f"overheard/{client}/{part}", {}) for part in initial}
        for client in about.get("overheard", ())
    }
    for name, value in about["plain"].items():
        setattr(at, name, _restore_keys(value))
    keys, numbers = [(part, leaf) for part, leaf in about["keys"]], tree["numbers"]
    rows = [dict(zip(keys, row)) for row in numbers["held"].tolist()]
    held = {int(client): rows[row] for client, row in about["held"].items()}
    versions = dict(zip(keys, numbers["versions"].tolist()))
    at.channel.restore(at.shared, Knowledge(versions, held, _restore_keys(about["folds_seen"])))
    at.channel.ledger[:] = ledger_from_table(numbers["ledger"], about["words"])


def states_to_tree(states: Mapping[int, ClientState]) -> dict[str, Mapping[str, Tensor]]:
    """Return the clients' states as one tree with parts ``CLIENT/kept/PART`` and ``CLIENT/moments/PART``."""
    tree: dict[str, Mapping[str, Tensor]] = {}
    for client, state in states.items():
        tree |= {f"{client}/kept/{part}": layer for part, layer in state.kept.items() if layer}
        tree |= {f"{client}/moments/{part}": layer for part, layer in moment_layers(state.moments or {}).items()}
    return tree


def states_from_tree(tree: Tree, parts: Iterable[str], device: torch.device) -> dict[int, ClientState]:
    """Invert ``states_to_tree``; clients that keep no leaf are missing."""
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for key, layer in _to_device(tree, device).items():
        client, group, part = key.split("/", 2)
        groups.setdefault(int(client), {"kept": {}, "moments": {}})[group][part] = layer
    return {
        client: ClientState({part: trees["kept"].get(part, {}) for part in parts}, moments_of(trees["moments"]))
        for client, trees in groups.items()
    }


def moment_layers(moments: OptimizerState) -> dict[str, dict[str, Tensor]]:
    """Convert an optimizer's moments to a tree with parts ``PART//LEAF``; values that are no tensors are left out."""
    return {
        f"{part}//{leaf}": {name: x for name, x in values.items() if isinstance(x, Tensor)}
        for (part, leaf), values in moments.items()
    }


def moments_of(layers: Tree) -> OptimizerState | None:
    """Invert ``moment_layers``."""
    moments: OptimizerState = {}
    for key, values in layers.items():
        part, _, leaf = key.rpartition("//")
        moments[part, leaf] = dict(values)
    return moments or None


def _ledger_table(rows: list[Transfer]) -> tuple[Tensor, dict[str, Any]]:
    """Convert the ledger to a table of integers, with its words numbered."""
    words: dict[str, int] = {}
    textual = [i for i, value in enumerate(rows[0]) if isinstance(value, str)] if rows else []
    table = [[words.setdefault(x, len(words)) if isinstance(x, str) else x for x in row] for row in rows]
    shape = (len(rows), len(Transfer._fields))
    return torch.tensor(table, dtype=torch.int64).reshape(shape), {"words": list(words), "textual": textual}


def ledger_from_table(table: Tensor, about: Mapping[str, Any]) -> list[Transfer]:
    """Invert ``_ledger_table``."""
    words, textual = about["words"], about["textual"]
    return [Transfer(*(words[x] if i in textual else x for i, x in enumerate(row))) for row in table.tolist()]


def _restore_keys(value: Any) -> Any:
    """Convert client numbers, which are strings as keys in JSON, to integers."""
    return {int(k) if k.isdecimal() else k: v for k, v in value.items()} if isinstance(value, dict) else value


def _to_device(tree: Tree, device: torch.device) -> dict[str, dict[str, Tensor]]:
    return {part: {leaf: x.to(device) for leaf, x in layer.items()} for part, layer in tree.items()}
