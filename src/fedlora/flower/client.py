"""A client of a federation over messages: joins, trains, evaluates. Only the records are Flower's."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fedlora.engines.base_updates import BaseUpdate
from fedlora.engines.client_turn import ClientState, ClientTurn
from fedlora.engines.clients import DROPPED
from fedlora.engines.federation import Federation
from fedlora.engines.inputs import describe_changes, digest_rows, model_settings
from fedlora.engines.network_settings import Network
from fedlora.files import digest
from fedlora.flower.client_store import ClientStore, StoredState, select_leaves
from fedlora.flower.wire import Order, overlay
from fedlora.methods._base import pick
from fedlora.tasks.data.labels import READINGS
from fedlora.training.evaluation import Evaluator
from fedlora.types import Tree


class StaleError(ValueError):
    """The client does not hold what the message builds on; it must be sent everything."""


class DroppedError(ValueError):
    """The seed lets this client drop out of this round: it does nothing with its order."""


class ChangedRowsError(ValueError):
    """The client's rows are not those that it began the run with. The text may hold labels, so it stays here."""


class Answer(NamedTuple):
    """A client's answer: metrics, the digest of the leaves that it holds, and after a turn the upload."""

    metrics: dict[str, int | float]
    holds: str
    sent: Tree | None = None


@dataclass
class SharedBase:
    """The base model of the process, and the base updates in it, which differ between clients of one process."""

    federation: Federation
    applied: tuple[str, ...] = ()
    evaluator: Evaluator = field(init=False)
    initial: Tree = field(init=False)
    start: str = field(init=False)  # a digest of the leaves from the seed and of the pretrained weights

    def __post_init__(self):
        f = self.federation
        self.evaluator, self.initial, self.start = f.evaluator(), f.model.initial(f.seed), digest_start(f)

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Digests of this machine's rows, and how their labels are read, for the client's own disk only."""
        f = self.federation
        return {**digest_rows(f), "reading": "" if f.data is None else f.data.reading}

    def bring_to(self, base_updates: tuple[str, ...], store: ClientStore) -> None:
        """Folds what is missing; starts from the pretrained weights where other base updates are in them."""
        model = self.federation.model
        if self.applied != base_updates[: len(self.applied)]:
            self._unfold()
        for name in base_updates[len(self.applied) :]:
            try:
                model.fold(store.load_base_update(name))
            except BaseException:
                self._unfold()  # half of it may be in the base
                raise
            self.applied = (*self.applied, name)

    def _unfold(self) -> None:
        self.federation.model.unfold()
        self.applied = ()


@dataclass
class Node:
    """Client number ``client`` of a federation, with its state in ``store``."""

    base: SharedBase
    client: int
    store: ClientStore
    network: Network = field(default_factory=Network)  # the terms of this client's own configuration
    step_done: Callable[[], None] = lambda: None

    @property
    def federation(self) -> Federation:
        return self.base.federation

    def hello(self) -> Answer:
        """Who this is: number, rows, reading of labels, number of base updates, and a digest of the first leaves.

        The reading is that of a column, by name or by position, and says nothing of any row.
        """
        f = self.federation
        self._check_rows()
        count = len(f.shards[self.client].train) if 0 <= self.client < f.clients.members else 0
        held = self.store.load(self.client)
        reading = READINGS.index("" if f.data is None else f.data.reading)
        metrics = {
            "client": self.client,
            "examples": count,
            "base_updates_held": held.base_updates_held,
            "labels": reading,
        }
        return Answer(metrics, f"{self.base.start} {held.base}")

    def train(self, order: Order, leaves: Tree, base_updates: Sequence[BaseUpdate], sharing: int = 0) -> Answer:
        """One turn. Its outcome is kept as pending until the server says that it counted.

        ``sharing`` is how many clients of a hidden sum must stay, so that their noise together is what privacy needs.
        """
        f = self.federation
        if self.client in f.clients.draw_dropouts(order.round, f.seed):
            raise DroppedError(DROPPED)
        self._check_rows(begins=True)
        before = self.store.load(self.client)
        if order.round < max(before.pending, before.counted):
            raise ValueError(f"an order for round {order.round} came after one for round {before.pending}.")
        holding, shared, holds = self._received(before, order, leaves, base_updates)
        key = self.store.key(self.client) if f.privacy.secret else None
        turn = ClientTurn(f, f.turn(order.round, self.client), self.step_done, key, sharing)
        update = turn.run(shared, ClientState(holding.kept, holding.moments))
        trained, moments = update.state
        self.store.save(
            self.client,
            replace(holding, trained=trained, trained_moments=moments, pending=order.round, counted=order.counted),
        )
        count = len(f.shards[self.client].train)
        if line := f.privacy_ledger.spending_line(order.round + 1):
            print(line, file=sys.stderr)
        loss = 0.0 if f.privacy.hides_figures else update.loss
        return Answer({"round": order.round, "examples": count, "loss": loss}, holds, update.sent)

    def evaluate(self, order: Order, leaves: Tree, base_updates: Sequence[BaseUpdate]) -> Answer:
        """Sums and counts of each score, on the client's own test rows.

        The delivery is kept; the last turn stays pending, since a server that dies now may ask for it once more.
        """
        self._check_rows(begins=True)
        before = self.store.load(self.client)
        holding, shared, holds = self._received(before, order, leaves, base_updates)
        arrived = {name: getattr(holding, name) for name in ("leaves", "base_updates", "base_updates_held", "base")}
        self.store.save(self.client, replace(before, counted=order.counted, **arrived))
        scores = self.federation.score_client(self.base.evaluator, order.round, self.client, shared, holding.kept)
        metrics: dict[str, int | float] = {"round": order.round}
        for name, (total, count) in scores.sums.items():
            metrics |= {f"{name}.sum": total, f"{name}.count": count}
        return Answer(metrics, holds)

    def _check_rows(self, begins: bool = False) -> None:
        """``ChangedRowsError`` where the rows are not those of the first turn; ``begins``: this may be the first."""
        before = self.store.load_rows(self.client)
        if before is None and begins:
            self.store.save_rows(self.client, self.base.rows)
        found = describe_changes(before, self.base.rows) if before is not None else []
        if found:
            raise ChangedRowsError(
                f"client {self.client} began this run with other data: {'; '.join(found)}; put back what it began with "
                "and start this node again, or let the federation begin a new run."
            )

    def _received(
        self, before: StoredState, order: Order, leaves: Tree, base_updates: Sequence[BaseUpdate]
    ) -> tuple[StoredState, Tree, str]:
        """The state ``before`` with what came along, the server's tree, and its digest, which is the server's."""
        held = before.resolve_pending(order.counted)
        held = replace(held, leaves={}) if order.full else held
        held = self._catch_up(held, order, base_updates)
        f = self.federation
        rank = f.budgets[self.client]
        start = {part: rule.adapter.leading(self.base.initial[part], rank) for part, rule in f.rules.items()}
        shared = overlay(start, held.leaves)
        holds = digest(select_leaves(f.rules, shared, rank))
        if holds != order.holds:  # else it had these leaves already, and its reply was lost
            leaves = f.compression.decode_delivery(leaves, shared)
            known = {p: pick(x, set(x) & f.rules[p].adapter.trainable) for p, x in leaves.items() if p in f.rules}
            held = replace(held, leaves=overlay(held.leaves, known))
            shared = overlay(start, held.leaves)
            holds = digest(select_leaves(f.rules, shared, rank))
        if holds != order.holds:
            raise StaleError("what this client holds is not what the server thinks it holds.")
        self.base.bring_to(held.base_updates, self.store)
        return held, shared, holds

    def _catch_up(self, held: StoredState, order: Order, base_updates: Sequence[BaseUpdate]) -> StoredState:
        """Adds the base updates that the client lacks, on the base that they were made for. None is added twice.

        A base is known by its number of base updates and the server's name for it: a round that a server ran twice may
        have had another base update the second time.
        """
        if (held.base_updates_held, held.base) == (order.after, order.base):
            return held
        if order.first == 0:
            held = replace(held, base_updates=(), base_updates_held=0, base="")
        if (held.base_updates_held, held.base) != (order.first, order.before):
            raise StaleError(
                f"this client has {held.base_updates_held} base updates; the message has those from {order.first} on."
            )
        names = [self.store.add_base_update(self.federation.compression.widen(some)) for some in base_updates]
        return replace(held, base_updates=(*held.base_updates, *names), base_updates_held=order.after, base=order.base)


def digest_start(f: Federation) -> str:
    """A digest of all that every client must have alike: configuration, leaves from the seed, and the pretrained model.

    Of the model it has what its config.json sets, and of each weight up to 1,024 values, in bfloat16, the coarsest
    precision that a client may hold it in.
    """
    sample = {"leaves": {"": torch.frombuffer(bytearray(digest(f.model.initial(f.seed)).encode()), dtype=torch.uint8)}}
    for name, x in f.model.network.state_dict().items():
        if x.is_floating_point():
            values = x.detach().reshape(-1)
            sample[name] = {str(tuple(x.shape)): values[:: max(1, len(values) // 1024)][:1024].bfloat16()}
    settings = json.dumps(model_settings(f.model.network))
    return digest(sample | {"configuration": dict.fromkeys((f.fingerprint, settings), torch.zeros(0))})
