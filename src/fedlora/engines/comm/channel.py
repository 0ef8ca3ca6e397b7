"""What crosses the wire, and the book of it. A leaf that the receiver holds already costs nothing."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from fedlora.engines.base_updates import BaseUpdate, BaseUpdateLog
from fedlora.engines.comm.compression import Compression
from fedlora.engines.comm.encoding import SAID
from fedlora.rounds import public_leaves
from fedlora.types import Tree

Kind = Literal["adapter", "head", "base_update"]


class Crossing(NamedTuple):
    """One client's traffic of one kind, in one direction, in one round."""

    round: int
    client: int
    direction: Literal["up", "down"]
    kind: Kind
    numbers: int
    bytes: int


@dataclass
class Ledger:
    """Every crossing of a run, in the order it happened."""

    rows: list[Crossing] = field(default_factory=list)

    def bytes(self, direction: str, kind: str | None = None, round: int | None = None) -> int:
        """Bytes that crossed, over all clients."""
        return sum(
            row.bytes
            for row in self.rows
            if row.direction == direction and kind in (None, row.kind) and round in (None, row.round)
        )


@dataclass(frozen=True)
class Delivery:
    """What one client lacks, and what it holds once it has that."""

    leaves: Tree  # only the leaves that changed, as they cross
    held: Tree  # the same leaves as the client then holds them
    base_updates: list[BaseUpdate]  # in order
    first: int  # number of base updates that the client holds before them
    after: int  # and with them
    versions: dict[tuple[str, str], int] = field(repr=False)


class Knowledge(NamedTuple):
    """What has been seen to be held, and by whom: plain values, apart from the leaves themselves."""

    versions: dict[tuple[str, str], int]  # of each leaf, the newest; 0: as every party makes it from the seed
    held: dict[int, dict[tuple[str, str], int]]  # client -> the versions that it has
    base_updates_seen: dict[int, int]


@dataclass
class Channel:
    """Says what a client lacks, and counts the bytes of what it is sent and sends.

    ``initial`` is what every party makes from the seed. A leaf has changed when the server made a new tensor of it:
    hooks are pure, so a leaf that a method passed on is the very same object.
    """

    initial: Tree
    heads: frozenset[str]  # the parts trained in full
    compression: Compression = field(default_factory=Compression)
    ledger: Ledger = field(default_factory=Ledger)
    _versions: dict[tuple[str, str], tuple[Tensor, int]] = field(default_factory=dict)
    _held: dict[int, dict[tuple[str, str], int]] = field(default_factory=dict)
    _base_updates_seen: dict[int, int] = field(default_factory=dict)

    def __post_init__(self):
        self._note(self.initial)

    def compute_delta(self, client: int, shared: Tree, log: BaseUpdateLog, own: Tree | None = None) -> Delivery:
        """Returns the leaves and base updates that a client is not known to hold: as few numbers as possible.

        ``own`` is what the client makes of the tree: a leaf that it holds at a smaller rank is sent at that rank.
        """
        versions, held, own = self._note(shared), self._held.get(client, {}), own or {}
        leaves: dict[str, dict[str, Tensor]] = {}
        crossing: dict[str, dict[str, Tensor]] = {}
        for (part, leaf), version in versions.items():
            had, whole = held.get((part, leaf), 0), shared[part][leaf]
            if had == version:
                continue
            mine = leaves.setdefault(part, {})[leaf] = _smaller(whole, own.get(part, {}).get(leaf))
            coded = self.compression.crossing(shared[part], leaf, had, version)
            cut = mine.numel() < whole.numel()  # and an encoding is of the whole leaf
            crossing.setdefault(part, {}).update({leaf: mine} if cut or coded is None else coded)
        seen = self.base_updates_seen(client)
        # The update of a round was rounded before it was applied; a sum of several was not, and is sent as it is.
        lone = {id(entry) for entry in log.entries}
        base_updates = [self.compression.narrowed(x) if id(x) in lone else x for x in log.missing(seen)]
        return Delivery(crossing, leaves, base_updates, seen, len(log), versions)

    def deliver(self, round: int, client: int, delivery: Delivery) -> None:
        """Counts what goes down to a client."""
        self._write(round, client, "down", self._leaves(delivery.held, delivery.leaves))
        factors = (
            side
            for base_updates in delivery.base_updates
            for layers in base_updates.values()
            for f in layers
            for side in f
        )
        self._write(round, client, "down", (("base_update", side.numel(), _size([side])) for side in factors))

    def holds(self, client: int, delivery: Delivery) -> None:
        """The client has what was delivered."""
        self._held[client], self._base_updates_seen[client] = delivery.versions, delivery.after

    def knows(self, client: int) -> bool:
        """Whether the client has been seen to hold anything."""
        return client in self._held

    def forget(self, client: int, base_updates: int = 0) -> None:
        """Notes that the client has only the leaves from the seed and the first ``base_updates`` base updates."""
        self._held.pop(client, None)
        self._base_updates_seen[client] = base_updates

    def known(self, shared: Tree) -> Knowledge:
        """All that later deliveries depend on, beside the tree itself."""
        return Knowledge(self._note(shared), dict(self._held), dict(self._base_updates_seen))

    def recall(self, shared: Tree, known: Knowledge) -> None:
        """Goes on from what was known of a tree with these leaves."""
        self._versions = {(part, leaf): (shared[part][leaf], n) for (part, leaf), n in known.versions.items()}
        self._held, self._base_updates_seen = dict(known.held), dict(known.base_updates_seen)

    def base_updates_seen(self, client: int) -> int:
        """Returns the number of base updates that the client holds."""
        return self._base_updates_seen.get(client, 0)

    def held_by_all(self, clients: int) -> int:
        """Returns the number of base updates that all of so many clients hold."""
        return min(self.base_updates_seen(client) for client in range(clients))

    def collect(self, round: int, client: int, sent: Tree, crossed: Tree | None = None) -> None:
        """A client's upload, and what of it crossed where that is something else."""
        self._write(round, client, "up", self._leaves(sent, sent if crossed is None else crossed))

    def _leaves(self, tree: Tree, crossed: Tree) -> Iterable[tuple[Kind, int, int]]:
        """Of each part: its kind, how many numbers it has, and in how many bytes they cross."""
        for part, layer in tree.items():
            if layer:
                yield self._kind(part), sum(x.numel() for x in layer.values()), _size(crossed[part].values())

    def _kind(self, part: str) -> Kind:
        return "head" if part in self.heads else "adapter"

    def _note(self, tree: Tree) -> dict[tuple[str, str], int]:
        """The version number of each leaf; a leaf that is another object than before gets the next number."""
        for part, layer in tree.items():
            for leaf, x in public_leaves(layer).items():  # the server's own notes stay with it
                known, version = self._versions.get((part, leaf), (x, 0))
                after = int(layer[SAID + leaf]) if SAID + leaf in layer else version + 1  # a codec counts by itself
                self._versions[part, leaf] = (x, version if known is x else after)
        return {key: version for key, (_, version) in self._versions.items()}

    def _write(self, round: int, client: int, direction, leaves: Iterable[tuple[Kind, int, int]]) -> None:
        sums: dict[Kind, tuple[int, int]] = {}
        for kind, *more in leaves:
            numbers, size = sums.get(kind, (0, 0))
            sums[kind] = (numbers + more[0], size + more[1])
        self.ledger.rows += [Crossing(round, client, direction, kind, *both) for kind, both in sums.items()]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _smaller(whole: Tensor, own: Tensor | None) -> Tensor:
    return whole if own is None or own.numel() > whole.numel() else own
