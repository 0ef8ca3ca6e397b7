"""The communication between the server and the clients: deltas, and the bytes of every transfer."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from fedlora.engines.base_updates import BaseUpdate, BaseUpdateLog
from fedlora.engines.comm.compression import VERSION, Compression
from fedlora.rounds import public_leaves
from fedlora.types import Tree

Kind = Literal["adapter", "head", "base_update"]
Versions = dict[tuple[str, str], int]  # (part, leaf) -> version; 0: the first value, which the seed determines


class Transfer(NamedTuple):
    """One client's traffic of one kind, in one direction, in one round."""

    round: int
    client: int
    direction: Literal["up", "down"]
    kind: Kind
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Delivery:
    """The delta of one client: the leaves and base updates that it needs for the current server state."""

    leaves: Tree  # only the leaves that changed, as they are sent
    decoded: Tree  # the same leaves, decoded
    base_updates: list[BaseUpdate]  # in order
    first: int  # number of base updates that the client has before them
    after: int  # and with them
    versions: Versions = field(repr=False)


class Knowledge(NamedTuple):
    """The server's knowledge of the clients' leaves and base updates, without the leaves themselves."""

    versions: Versions  # the newest
    held: dict[int, Versions]  # client -> its versions
    base_update_counts: dict[int, int]


@dataclass
class Channel:
    """Computes the delta of each client, and counts the bytes in both directions.

    ``initial`` is the tree that every client computes from the seed. A leaf has changed if it is a new tensor: hooks
    are pure, so a leaf that a method passed on is the same object.
    """

    initial: Tree
    heads: frozenset[str]  # the parts trained in full
    compression: Compression = field(default_factory=Compression)
    ledger: list[Transfer] = field(default_factory=list)  # of the whole run, in order
    _versions: dict[tuple[str, str], tuple[Tensor, int]] = field(default_factory=dict)
    _held: dict[int, Versions] = field(default_factory=dict)
    _base_update_counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self):
        self._update_versions(self.initial)

    def compute_delta(self, client: int, shared: Tree, log: BaseUpdateLog, own: Tree | None = None) -> Delivery:
        """Return the leaves and base updates that a client is not known to have, in as few numbers as possible.

        ``own`` is the result of ``receive`` on the client: a leaf with a smaller rank there is sent at that rank.
        """
        versions, held, own = self._update_versions(shared), self._held.get(client, {}), own or {}
        decoded: dict[str, dict[str, Tensor]] = {}
        leaves: dict[str, dict[str, Tensor]] = {}
        for (part, leaf), version in versions.items():
            last, whole = held.get((part, leaf), 0), shared[part][leaf]
            if last == version:
                continue
            x = own.get(part, {}).get(leaf, whole)
            x = whole if x.numel() > whole.numel() else x
            decoded.setdefault(part, {})[leaf] = x
            encoded = self.compression.encoded_leaf(shared[part], leaf, last, version)
            cut = x.numel() < whole.numel()  # and an encoding is of the whole leaf
            leaves.setdefault(part, {}).update({leaf: x} if cut or encoded is None else encoded)
        count = self.count_base_updates(client)
        # The update of a round was rounded before it was applied; a sum of several was not, and is sent unchanged.
        rounded = {id(entry) for entry in log.entries}
        base_updates = [self.compression.narrow(x) if id(x) in rounded else x for x in log.missing(count)]
        return Delivery(leaves, decoded, base_updates, count, len(log), versions)

    def record_delivery(self, round: int, client: int, delivery: Delivery) -> None:
        """Count a delivery to a client."""
        self._record(round, client, "down", self._sizes(delivery.decoded, delivery.leaves))
        terms = [f for update in delivery.base_updates for several in update.values() for f in several]
        self._record(round, client, "down", (("base_update", x.numel(), x.nbytes) for f in terms for x in f))

    def record_upload(self, round: int, client: int, decoded: Tree, encoded: Tree | None = None) -> None:
        """Count a client's upload; ``encoded`` is its form on the wire, if that is another one."""
        self._record(round, client, "up", self._sizes(decoded, decoded if encoded is None else encoded))

    def confirm(self, client: int, delivery: Delivery) -> None:
        """Note that a delivery has arrived."""
        self._held[client], self._base_update_counts[client] = delivery.versions, delivery.after

    def is_known(self, client: int) -> bool:
        """Whether the client is known to have a version of the tree."""
        return client in self._held

    def forget(self, client: int, base_updates: int = 0) -> None:
        """Note that the client has only the leaves from the seed and the first ``base_updates`` base updates."""
        self._held.pop(client, None)
        self._base_update_counts[client] = base_updates

    def knowledge(self, shared: Tree) -> Knowledge:
        """Return everything that later deliveries depend on, beside the tree itself."""
        return Knowledge(self._update_versions(shared), dict(self._held), dict(self._base_update_counts))

    def restore(self, shared: Tree, known: Knowledge) -> None:
        """Restore the knowledge of a tree with these leaves."""
        self._versions = {(part, leaf): (shared[part][leaf], n) for (part, leaf), n in known.versions.items()}
        self._held, self._base_update_counts = dict(known.held), dict(known.base_update_counts)

    def count_base_updates(self, client: int) -> int:
        """Return the number of base updates that the client has."""
        return self._base_update_counts.get(client, 0)

    def _sizes(self, decoded: Tree, encoded: Tree) -> Iterable[tuple[Kind, int, int]]:
        """Yield each part's kind, its count of numbers and its bytes on the wire."""
        for part, layer in decoded.items():
            if layer:
                kind: Kind = "head" if part in self.heads else "adapter"
                yield kind, sum(x.numel() for x in layer.values()), sum(x.nbytes for x in encoded[part].values())

    def _update_versions(self, tree: Tree) -> Versions:
        """Return the version of each leaf; a leaf that is another object than before gets the next version."""
        for part, layer in tree.items():
            for leaf, x in public_leaves(layer).items():  # the server's own notes stay with it
                last, version = self._versions.get((part, leaf), (x, 0))
                after = int(layer[VERSION + leaf]) if VERSION + leaf in layer else version + 1
                self._versions[part, leaf] = (x, version if last is x else after)
        return {key: version for key, (_, version) in self._versions.items()}

    def _record(self, round: int, client: int, direction, sizes: Iterable[tuple[Kind, int, int]]) -> None:
        sums: dict[Kind, tuple[int, int]] = {}
        for kind, numbers, size in sizes:
            total, total_size = sums.get(kind, (0, 0))
            sums[kind] = (total + numbers, total_size + size)
        self.ledger += [Transfer(round, client, direction, kind, *total) for kind, total in sums.items()]
