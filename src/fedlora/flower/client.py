"""A client of a federation over messages: it introduces itself, trains, and evaluates."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fedlora.engines.base_updates import BaseUpdate
from fedlora.engines.client_turn import ClientState, ClientTurn
from fedlora.engines.clients import DROPPED
from fedlora.engines.federation import Federation
from fedlora.engines.inputs import describe_changes, digest_rows, model_settings
from fedlora.engines.model_spec import ModelSpec
from fedlora.engines.network_settings import Network
from fedlora.files import digest
from fedlora.flower.client_store import ClientStore, StoredState, select_leaves
from fedlora.flower.wire import Order, overlay
from fedlora.methods._base import pick
from fedlora.tasks.data.labels import READINGS
from fedlora.training.evaluation import Scorer
from fedlora.types import Tree


class StaleError(ValueError):
    """The client lacks the state that the message builds on; the server must send everything."""


class DroppedError(ValueError):
    """The seed makes this client drop out of this round, so it ignores its order."""


class ChangedRowsError(ValueError):
    """The client's rows differ from those that it began the run with. The text may hold labels, so it is not sent."""


class Answer(NamedTuple):
    """A client's answer: metrics, the digest of its leaves, and after a turn its upload."""

    metrics: dict[str, int | float]
    holds: str
    sent: Tree | None = None


@dataclass
class SharedBase:
    """The base model of the process, and the base updates in it. All clients of the process use it in turn."""

    federation: Federation
    spec: ModelSpec | None = None  # of the model, if clients have trainers of their own
    applied: tuple[str, ...] = ()
    evaluator: Scorer | None = field(init=False)  # None: clients' own trainers have no test rows
    initial: Tree = field(init=False)
    start: str = field(init=False)  # digest of the initial leaves and of the pretrained weights

    def __post_init__(self):
        f = self.federation
        self.evaluator, self.initial, self.start = f.evaluator(), f.model.initial(f.seed), digest_start(f, self.spec)

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Digest of this machine's rows, for the client's own disk only, and the reading of their labels."""
        data = self.federation.data
        return {**digest_rows(self.federation), "reading": "" if data is None else data.reading}

    def apply_base_updates(self, names: tuple[str, ...], store: ClientStore) -> None:
        """Apply these base updates: on top of the present ones if they continue them, and from the start otherwise."""
        model = self.federation.model
        if self.applied != names[: len(self.applied)]:
            self._reset()
        for name in names[len(self.applied) :]:
            try:
                model.fold(store.load_base_update(name))
            except BaseException:
                self._reset()  # a part of it may be in the base
                raise
            self.applied = (*self.applied, name)

    def _reset(self) -> None:
        self.federation.model.unfold()
        self.applied = ()


@dataclass
class Node:
    """Client number ``client`` of a federation, with its state in ``store``."""

    base: SharedBase
    client: int
    store: ClientStore
    network: Network = field(default_factory=Network)  # of this client's own configuration

    @property
    def federation(self) -> Federation:
        return self.base.federation

    def hello(self) -> Answer:
        """Return the client's number, training rows, label reading, number of base updates, and digest of the start.

        The label reading (by name or by position) is a property of the column and reveals nothing about a row.
        """
        f = self.federation
        self._check_rows()
        stored = self.store.load(self.client)
        metrics = {
            "client": self.client,
            "examples": len(f.shards[self.client].train) if 0 <= self.client < f.clients.members else 0,
            "base_updates_held": stored.base_updates_held,
            "labels": READINGS.index(self.base.rows["reading"]),
        }
        return Answer(metrics, f"{self.base.start} {stored.base}")

    def train(self, order: Order, leaves: Tree, base_updates: Sequence[BaseUpdate], sharing: int = 0) -> Answer:
        """Run one turn. Its result stays pending until the server reports that it counted.

        ``sharing`` is the number of clients of a secure sum whose noise together must satisfy the privacy guarantee.
        """
        f = self.federation
        if self.client in f.clients.draw_dropouts(order.round, f.seed):
            raise DroppedError(DROPPED)
        self._check_rows(may_be_first=True)
        before = self.store.load(self.client)
        if order.round < max(before.pending, before.counted):
            raise ValueError(f"an order for round {order.round} came after one for round {before.pending}.")
        stored, shared, holds = self._receive(before, order, leaves, base_updates)
        key = self.store.key(self.client) if f.privacy.secret else None
        turn = ClientTurn(f, f.turn(order.round, self.client), key=key, summed=sharing)
        update = turn.run(shared, ClientState(stored.kept, stored.moments))
        trained, moments = update.state
        self.store.save(
            self.client,
            replace(stored, trained=trained, trained_moments=moments, pending=order.round, counted=order.counted),
        )
        if line := f.privacy_ledger.spending_line(order.round + 1):
            print(line, file=sys.stderr)
        figures: dict[str, int | float] = {"round": order.round, "examples": len(f.shards[self.client].train)}
        if f.privacy.hides_figures or update.loss is not None:  # a caller's own trainer may return no loss
            figures["loss"] = 0.0 if f.privacy.hides_figures or update.loss is None else update.loss
        return Answer(figures, holds, update.sent)

    def evaluate(self, order: Order, leaves: Tree, base_updates: Sequence[BaseUpdate]) -> Answer:
        """Return sums and counts of each score on the client's own test rows.

        The received state is stored. The last turn stays pending, since a server that dies now may repeat its order.
        """
        self._check_rows(may_be_first=True)
        before = self.store.load(self.client)
        stored, shared, holds = self._receive(before, order, leaves, base_updates)
        arrived = {name: getattr(stored, name) for name in ("leaves", "base_updates", "base_updates_held", "base")}
        self.store.save(self.client, replace(before, counted=order.counted, **arrived))
        metrics: dict[str, int | float] = {"round": order.round}
        if self.base.evaluator is None:
            return Answer(metrics, holds)
        scores = self.federation.score_client(self.base.evaluator, order.round, self.client, shared, stored.kept)
        for name, (total, count) in scores.sums.items():
            metrics |= {f"{name}.sum": total, f"{name}.count": count}
        return Answer(metrics, holds)

    def _check_rows(self, may_be_first: bool = False) -> None:
        """Raise ``ChangedRowsError`` if the rows are not those of the first turn, which this turn may be."""
        before = self.store.load_rows(self.client)
        if before is None:
            if may_be_first:
                self.store.save_rows(self.client, self.base.rows)
        elif differences := describe_changes(before, self.base.rows):
            raise ChangedRowsError(
                f"client {self.client} began this run with other data: {'; '.join(differences)}; put back what it "
                "began with and start this node again, or let the federation begin a new run."
            )

    def _receive(
        self, before: StoredState, order: Order, leaves: Tree, base_updates: Sequence[BaseUpdate]
    ) -> tuple[StoredState, Tree, str]:
        """Return the state ``before`` with the content of the message, the server's tree, and its digest."""
        f, rank = self.federation, self.federation.budgets[self.client]
        stored = before.resolve_pending(order.counted)
        stored = self._add_base_updates(replace(stored, leaves={}) if order.full else stored, order, base_updates)
        start = {part: rule.adapter.leading(self.base.initial[part], rank) for part, rule in f.rules.items()}
        shared = overlay(start, stored.leaves)
        holds = digest(select_leaves(f.rules, shared, rank))
        if holds != order.holds:  # else the client had these leaves already, and its reply was lost
            leaves = f.compression.decode_delivery(leaves, shared)
            trainable = {p: pick(x, set(x) & f.rules[p].adapter.trainable) for p, x in leaves.items() if p in f.rules}
            stored = replace(stored, leaves=overlay(stored.leaves, trainable))
            shared = overlay(start, stored.leaves)
            holds = digest(select_leaves(f.rules, shared, rank))
        if holds != order.holds:
            raise StaleError("this client does not hold the leaves that the server expects.")
        self.base.apply_base_updates(stored.base_updates, self.store)
        return stored, shared, holds

    def _add_base_updates(self, stored: StoredState, order: Order, base_updates: Sequence[BaseUpdate]) -> StoredState:
        """Add the base updates that the client lacks, to the base that they were made for. None is added twice.

        A base is identified by its number of base updates and its name: a server that repeats a round may make another
        base update the second time.
        """
        if (stored.base_updates_held, stored.base) == (order.after, order.base):
            return stored
        if order.first == 0:
            stored = replace(stored, base_updates=(), base_updates_held=0, base="")
        if (stored.base_updates_held, stored.base) != (order.first, order.before):
            raise StaleError(
                f"this client has {stored.base_updates_held} base updates; the message has those from {order.first} on."
            )
        names = [self.store.add_base_update(self.federation.compression.widen(x)) for x in base_updates]
        return replace(
            stored, base_updates=(*stored.base_updates, *names), base_updates_held=order.after, base=order.base
        )


def digest_start(f: Federation, spec: ModelSpec | None = None) -> str:
    """Return a digest of everything that all clients must share: configuration, initial leaves, pretrained model.

    Of the model it includes the settings of its config.json, and of each weight up to 1,024 values in bfloat16, the
    coarsest precision that a client may hold it in. ``spec`` has the same of a model that the server does not have.
    """
    sample = {"leaves": {"": torch.frombuffer(bytearray(digest(f.model.initial(f.seed)).encode()), dtype=torch.uint8)}}
    if spec is not None:
        settings = json.dumps(dict(spec.settings), sort_keys=True)
        return digest(sample | {"configuration": dict.fromkeys((f.fingerprint, settings, spec.base), torch.zeros(0))})
    for name, x in f.model.network.state_dict().items():
        if x.is_floating_point():
            values = x.detach().reshape(-1)
            sample[name] = {str(tuple(x.shape)): values[:: max(1, len(values) // 1024)][:1024].bfloat16()}
    settings = json.dumps(model_settings(f.model.network))
    return digest(sample | {"configuration": dict.fromkeys((f.fingerprint, settings), torch.zeros(0))})
