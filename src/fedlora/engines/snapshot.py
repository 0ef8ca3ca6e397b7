"""Where a run stands between two rounds, as references that no later round changes, as leaves on disk, and back.

All draws of a run come from its seed and the round's number, so there is no generator whose state would matter.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora.engines.comm.channel import Crossing, Knowledge
from fedlora.engines.loop import Private, Standing
from fedlora.engines.verified_files import to_device
from fedlora.training.local import State
from fedlora.types import Tree

APART = ("shared", "folds", "channel", "overheard")  # what of a standing is no plain value


class Key(NamedTuple):
    """A leaf of the shared tree."""

    part: str
    leaf: str


@dataclass(frozen=True)
class Snapshot:
    """A standing as it was: hooks are pure, so holding the leaves is enough."""

    shared: Tree
    plain: Mapping[str, Any]  # the round's number, who counted, and whatever else a standing says in plain values
    knowledge: Knowledge
    ledger: list[Crossing]
    folds: int
    privates: Mapping[int, Private] | None  # None: parties keep theirs on their own machines
    overheard: Mapping[int, Tree]

    @classmethod
    def take(cls, at: Standing, privates: Mapping[int, Private] | None) -> "Snapshot":
        """What the next round depends on, now."""
        plain = {f.name: getattr(at, f.name) for f in fields(at) if f.name not in APART}
        copied = deepcopy(plain)
        ledger = list(at.channel.ledger.rows)
        held = None if privates is None else dict(privates)
        known = at.channel.known(at.shared)
        return cls(at.shared, copied, known, ledger, len(at.folds), held, dict(at.overheard))

    @property
    def number(self) -> int:
        """Rounds that are finished."""
        return int(self.plain["number"])

    def leaves(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """As a tree and plain values. Leaves that still are what every party makes from the seed are only named."""
        versions = self.knowledge.versions
        changed = {
            f"shared/{part}": {leaf: x for leaf, x in layer.items() if versions.get((part, leaf), 1)}
            for part, layer in self.shared.items()
        }
        keys = list(versions)
        rows, held = _rows(self.knowledge.held, keys)
        ledger, words = _ledger(self.ledger)
        numbers = {"versions": torch.tensor(list(versions.values())), "held": held, "ledger": ledger}
        about = {
            "plain": self.plain, "leaves": {part: list(layer) for part, layer in self.shared.items()},
            "keys": keys, "held": rows, "folds_seen": self.knowledge.folds_seen, "words": words,
            "overheard": list(self.overheard),
        }  # fmt: skip
        heard = {f"overheard/{k}/{part}": layer for k, tree in self.overheard.items() for part, layer in tree.items()}
        return {**changed, **heard, "numbers": numbers}, about


def put_back(at: Standing, tree: Tree, about: Mapping[str, Any], device: torch.device) -> None:
    """Sets a fresh standing to a snapshot's leaves and plain values; its folds are the caller's."""
    saved = to_device({p.removeprefix("shared/"): x for p, x in tree.items() if p != "numbers"}, device)
    first = at.shared
    # A leaf with its first values stays the very object, so that nobody is sent it.
    at.shared = {
        part: {leaf: saved[part][leaf] if leaf in saved.get(part, ()) else first[part][leaf] for leaf in own}
        for part, own in about["leaves"].items()
    }
    at.overheard = {
        client: {part: saved.get(f"overheard/{client}/{part}", {}) for part in first}
        for client in about.get("overheard", ())
    }
    for name, value in about["plain"].items():
        setattr(at, name, _whole(value))
    keys, numbers = [Key(*key) for key in about["keys"]], tree["numbers"]
    rows = [dict(zip(keys, row)) for row in numbers["held"].tolist()]
    held = {int(client): rows[row] for client, row in about["held"].items()}
    versions = dict(zip(keys, numbers["versions"].tolist()))
    at.channel.recall(at.shared, Knowledge(versions, held, _whole(about["folds_seen"])))
    at.channel.ledger.rows[:] = _crossings(numbers["ledger"], about["words"])


def private_leaves(privates: Mapping[int, Private]) -> dict[str, Mapping[str, Tensor]]:
    """What clients keep and their optimisers' moments as one tree: ``CLIENT/kept/PART`` and ``CLIENT/moments/PART``."""
    tree: dict[str, Mapping[str, Tensor]] = {}
    for client, private in privates.items():
        tree |= {f"{client}/kept/{part}": layer for part, layer in private.kept.items() if layer}
        tree |= {f"{client}/moments/{part}": layer for part, layer in moment_layers(private.moments or {}).items()}
    return tree


def privates_of(tree: Tree, parts: Iterable[str], device: torch.device) -> dict[int, Private]:
    """What ``private_leaves`` wrote, by client; one that keeps no leaf is not among them."""
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for key, layer in to_device(tree, device).items():
        client, group, part = key.split("/", 2)
        groups.setdefault(int(client), {"kept": {}, "moments": {}})[group][part] = layer
    return {
        client: Private({part: own["kept"].get(part, {}) for part in parts}, moments_of(own["moments"]))
        for client, own in groups.items()
    }


def moment_layers(moments: State) -> dict[str, dict[str, Tensor]]:
    """An optimiser's moments as a tree: part ``PART//LEAF``. What an optimiser has not begun to keep is left out."""
    return {
        f"{part}//{leaf}": {name: x for name, x in values.items() if isinstance(x, Tensor)}
        for (part, leaf), values in moments.items()
    }


def moments_of(layers: Tree) -> State | None:
    """The moments that ``moment_layers`` wrote."""
    found: State = {}
    for key, values in layers.items():
        part, _, leaf = key.rpartition("//")
        found[part, leaf] = dict(values)
    return found or None


def _rows(held: Mapping[int, Mapping], keys: list) -> tuple[dict[int, int], Tensor]:
    """Which row of the table is each client's, and the table; clients that were last sent the same share a row."""
    table: dict[tuple[int, ...], int] = {}
    rows = {
        client: table.setdefault(tuple(own.get(key, 0) for key in keys), len(table)) for client, own in held.items()
    }
    return rows, torch.tensor(list(table), dtype=torch.int64).reshape(len(table), len(keys))


def _ledger(rows: list[Crossing]) -> tuple[Tensor, dict[str, Any]]:
    """The ledger as a table of whole numbers; words are numbered."""
    words: dict[str, int] = {}
    textual = [i for i, value in enumerate(rows[0])] if rows else []
    textual = [i for i in textual if isinstance(rows[0][i], str)]
    table = [[words.setdefault(x, len(words)) if isinstance(x, str) else x for x in row] for row in rows]
    shape = (len(rows), len(Crossing._fields))
    return torch.tensor(table, dtype=torch.int64).reshape(shape), {"words": list(words), "textual": textual}


def _crossings(table: Tensor, about: Mapping[str, Any]) -> list[Crossing]:
    words, textual = about["words"], set(about["textual"])
    return [Crossing(*(words[x] if i in textual else x for i, x in enumerate(row))) for row in table.tolist()]


def _whole(value: Any) -> Any:
    """A mapping by client, whose keys JSON made strings of, as it was; other names stay."""
    return {int(k) if k.isdecimal() else k: v for k, v in value.items()} if isinstance(value, dict) else value
