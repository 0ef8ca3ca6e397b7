"""Parties whose state lies on this machine, as in a simulation: a run goes on from what its checkpoint says of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedlora.engines.base_updates import Folds, folds_to_tree
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Private, Standing
from fedlora.files import digest
from fedlora.flower.client import visible
from fedlora.flower.client_store import Holding, Store


@dataclass
class Bases:
    """A name for the base after each fold, which no other folds have."""

    names: list[str] = field(default_factory=lambda: [""])  # number of folds -> the base's name

    def add(self, folds: Folds) -> None:
        """One more fold."""
        self.names.append(digest({"before": {self.names[-1]: torch.zeros(0)}, **folds_to_tree(folds)}))

    def __getitem__(self, number: int) -> str:
        return self.names[number]


@dataclass
class Home:
    """Where all parties of a run keep their state, on this machine."""

    store: Store
    _folds: list[str] = field(default_factory=list)
    _read: dict[int, tuple[int, Private]] = field(default_factory=dict)

    def privates(self, at: Standing) -> dict[int, Private]:
        """What each keeps after the last round that its upload went into."""
        for client, number in at.counted.items():
            if self._read.get(client, (-1, None))[0] != number:
                held = self.store.load(client).settled(number)
                self._read[client] = number, Private(held.kept, held.moments)
        return {client: self._read[client][1] for client in sorted(at.counted)}

    def refolded(self, folds: Folds) -> None:
        """A fold that parties hold, or will be sent."""
        self._folds.append(self.store.add(folds))

    def resumed(self, f: Federation, at: Standing, privates: Mapping[int, Private], bases: Bases) -> None:
        """Gives each party what it is known to hold; leaves that it lacks are sent before they are looked at."""
        for client in range(f.clients.members):
            own = privates.get(client, Private({}))
            seen = at.channel.folds_seen(client)
            leaves = visible(f.rules, at.shared, f.budgets[client]) if at.channel.knows(client) else {}
            counted = at.counted.get(client, -1)
            self.store.save(
                client,
                Holding(
                    leaves, own.kept, own.moments, counted=counted, folds=tuple(self._folds[:seen]), folded=seen,
                    base=bases[seen],
                ),
            )  # fmt: skip
            self._read[client] = counted, own
