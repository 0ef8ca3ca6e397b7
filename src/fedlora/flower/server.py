"""The server: rounds over a Flower grid, with whoever is there.

A round asks its cohort; who errs, is late or is gone is named and left out, and the weights of the others are
renormalised. With fewer than ``min_clients`` good uploads the round waits, asks who comes back, and keeps what it has.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora.engines.base_updates import BaseUpdate
from fedlora.engines.client_turn import ClientState
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Event, Loop, Reply, Round, ServerState
from fedlora.engines.network_settings import Network
from fedlora.files import digest, upload_limits
from fedlora.flower import replies as checks
from fedlora.flower.client import made, visible
from fedlora.flower.client_messages import STALE
from fedlora.flower.exchange import answered
from fedlora.flower.local_stores import Bases, Home
from fedlora.flower.node_directory import GONE, Directory
from fedlora.flower.quorum import Quorum
from fedlora.flower.wire import HOLDS, LEAVES, METRICS, Asked, Order, asked, reported, unpack
from fedlora.rounds import Received, Served
from fedlora.security.validation import excluded_clients
from fedlora.tasks._base import Scores
from fedlora.tasks.data.labels import NAME, positions
from fedlora.training.evaluation import Evaluator


@dataclass
class Federated(Loop, Strategy):
    """A Flower strategy made of a federation; ``start`` runs it, and so does ``run`` once there is a grid."""

    federation: Federation = field(kw_only=True)
    network: Network = field(default_factory=Network, kw_only=True)
    token: str = field(default="run", kw_only=True)  # of this run: parties keep their state under it
    grid: Grid | None = field(default=None, kw_only=True)
    home: Home | None = field(default=None, kw_only=True)  # the parties' state, where it is on this machine
    directory: Directory | None = field(default=None, init=False)
    at: ServerState | None = field(default=None, init=False)
    replies: dict[int, Reply] = field(default_factory=dict, init=False)  # of the round that is under way
    results: dict[int, Scores] = field(default_factory=dict, init=False)
    _first: int = field(default=0, init=False)  # the round that it begins with, or goes on with
    stopped: bool = field(default=False, init=False)  # set by another thread: the next pause raises KeyboardInterrupt
    _bases: Bases = field(default_factory=Bases, init=False)
    _round: int = field(default=0, init=False)
    _blamed: dict[int, str] = field(default_factory=dict, init=False)  # client -> why it is left out
    _orders: dict[int, Asked] = field(default_factory=dict, init=False)  # node -> its last order
    _sent: dict[str, Asked] = field(default_factory=dict, init=False)  # message id -> that order

    # ------------------------------------------------------------------------------ as an engine
    def begin(self, f: Federation) -> ServerState:
        self._connect(f)
        self._bases = Bases()
        return super().begin(f)

    def _connect(self, f: Federation) -> None:
        assert self.grid is not None, "start(grid) first"
        self.directory = Directory(
            self.grid, f.clients.members, self.token, made(f), self._told, self._described, self.network.retry,
            self._pause,
        )  # fmt: skip

    def readings(self) -> Mapping[int, str]:
        return {} if self.directory is None or not self.federation.clients.own_data else self.directory.readings

    def _described(self, reading: str) -> str:
        """How a party with data of its own reads its labels, after the word that it joined."""
        f = self.federation
        if not reading or not f.clients.own_data:
            return ""
        if reading == NAME:
            return "; its labels are matched by name"
        return f"; its labels are numbers and read as positions, {positions(f.task.all_labels())}"

    def _combine(self, f: Federation, at: ServerState, uploads: list[Received]) -> Served:
        served = super()._combine(f, at, uploads)
        if served.folds:
            self._bases.add(at.folds.entries[-1])
        return served

    def client_states(self, at: ServerState) -> Mapping[int, ClientState] | None:
        return None if self.home is None else self.home.client_states(at)

    def on_base_update(self, folds: BaseUpdate) -> None:
        self._bases.add(folds)
        if self.home is not None:
            self.home.on_base_update(folds)

    def restore(self, f: Federation, at: ServerState, states: Mapping[int, ClientState] | None) -> None:
        if self.home is not None and states is not None:
            self.home.restore(f, at, states, self._bases)

    def is_measured(self, f: Federation) -> bool:
        return f.evaluation.measure and not f.method.personal  # what a party keeps, nobody here can measure

    def run(self, f: Federation, at: ServerState | None = None) -> Iterator[Round]:
        at = at or self.begin(f)
        self._first = at.number
        return super().run(f, at)

    def run_turns(self, f: Federation, at: ServerState) -> list[Reply]:
        began = self._enter(at)
        order, wanted = self._wanted(f, at)
        least, tried = min(self.network.min_clients, wanted), set[int]()
        while True:
            self._quorum.check(least, set(order), self.replies.keys())
            self._ask([k for k in order if k in self._directory.here() - tried][: wanted - len(self.replies)], tried)
            if len(self.replies) >= least:
                return self._left(f, at, began)
            self._wait(least, tried, set(order))

    def _wanted(self, f: Federation, at: ServerState) -> tuple[list[int], int]:
        """Who may train, in order, and how many are to. Who is drawn to drop out gets an order and has no stand-in."""
        out_of_it = excluded_clients(f.hygiene, at.conduct)  # they get no order, and have no stand-in either
        if out := sorted(set(f.clients.dropped(at.number, f.seed)) & self._directory.here() - out_of_it):
            self._ask(out, set())
        order = [c for c in f.order(at.number) if c not in self.absent.keys() | out_of_it]
        return order, len(set(f.clients.staying(at.number, f.cohort_seed)) - out_of_it)

    def _enter(self, at: ServerState) -> float:
        """A round begins; the first one waits for all parties. Returns when that was."""
        began, self.at, self.replies, self._blamed, self._round = time.perf_counter(), at, {}, self.absent, at.number
        self._quorum = Quorum(self._directory, at.number, self.network.repair_timeout, self.watch, self.absent)
        if at.number == self._first:
            self._directory.wait(self.network.join_timeout)
        else:
            self._directory.refresh()
        return began

    def _left(self, f: Federation, at: ServerState, began: float) -> list[Reply]:
        """The turns are over: the cohort's members that are missing are named."""
        for client in sorted(set(f.cohort(at.number)) - self.replies.keys() - self.screen.rejected.keys()):
            self._lost(client, self.absent.get(client, GONE))
        self.clock["train"] += time.perf_counter() - began
        return [self.replies[client] for client in sorted(self.replies)]

    def score_clients(
        self, f: Federation, at: ServerState, number: int, evaluator: Evaluator | None
    ) -> Mapping[int, Scores]:
        self.at, self.results, self._blamed, self._round = at, {}, self.unscored, number
        self._directory.refresh()
        orders = self.configure_evaluate(number + 1, None, None, self.grid)
        self.aggregate_evaluate(number + 1, self._exchange(list(orders)))
        for client in sorted(set(range(f.clients.members)) - self.results.keys() - self.unscored.keys()):
            self._lost(client, GONE)
        return dict(sorted(self.results.items()))

    # --------------------------------------------------------------------- as a Flower strategy
    def start(
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, num_rounds: int | None = None,
        timeout: float = 3600, train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None, evaluate_fn=None,
    ) -> Result:  # fmt: skip
        """Runs the federation to its end. What it starts from, and how long it runs, is in the federation."""
        self.grid, result = grid, Result()
        for done in self.run(self.federation):
            reported(result, done)
        return result

    def configure_train(
        self, server_round: int, arrays, config, grid, clients: Iterable[int] = ()
    ) -> Iterable[Message]:
        """Each client's order for a round, with the leaves and folds that it lacks."""
        assert self.at is not None
        return [self._message(client, server_round - 1, "train") for client in clients]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """Takes in the uploads that are sound; ``run`` combines them."""
        for reply in replies:
            self._taken(reply, self._upload)
        return None, None

    def configure_evaluate(self, server_round: int, arrays, config, grid) -> Iterable[Message]:
        """Each connected client's order to score what it holds after a round."""
        return [self._message(client, server_round - 1, "evaluate") for client in sorted(self._directory.here())]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]):
        """Takes in the scores that are sound."""
        for reply in replies:
            self._taken(reply, self._score)

    def summary(self) -> None:
        """What a run is, is in its folder."""

    @property
    def _directory(self) -> Directory:
        if self.directory is None:
            self._connect(self.federation)
        assert self.directory is not None
        return self.directory

    def _ask(self, clients: list[int], tried: set[int]) -> None:
        """One attempt, and a second for those that turn out to hold something else than the server thought."""
        tried |= set(clients)
        self._quorum.failed |= set(clients)  # until they have answered
        for _ in range(2):
            messages = list(self.configure_train(self._round + 1, None, None, self.grid, clients))
            self.aggregate_train(self._round + 1, self._exchange(messages))
            clients = [client for client in clients if self.absent.get(client) == STALE]
            if not clients:
                return

    def _wait(self, least: int, tried: set[int], able: set[int]) -> None:
        """Until one is here that has not been asked, one is back, or it is time to ask the others once more."""
        gone = tried - self._directory.here()
        text = f"{len(self.replies)} of at least {least} clients have answered; waiting for more"
        self.watch(Event("waiting", self._round, text=text))
        again = time.monotonic() + self.network.retry
        while not (self._directory.here() & able) - tried:
            self._quorum.check(least, able, self.replies.keys())
            self._pause()
            self._directory.refresh()
            back = gone & self._directory.here() - self.replies.keys()
            self._quorum.failed -= back
            gone |= tried - self._directory.here()
            tried -= back if time.monotonic() < again else tried - self.replies.keys()

    def _pause(self) -> None:
        """Between two looks."""
        time.sleep(self.network.poll)
        if self.stopped:
            raise KeyboardInterrupt

    def _message(self, client: int, number: int, kind: str, with_leaves: bool = True) -> Message:
        f, at = self.federation, self.at
        own = visible(f.rules, at.shared, f.budgets[client])
        if not at.channel.knows(client):
            count, base = self._directory.folded.pop(client, (0, ""))
            there = at.folds.start <= count <= len(at.folds) and self._bases[count] == base
            at.channel.forget(client, count if there else 0)
        delivery = at.channel.compute_delta(client, at.shared, at.folds, own)
        order = Order(
            self.token, number, client, not at.channel.knows(client), delivery.first, delivery.after,
            self._bases[delivery.first], self._bases[delivery.after], digest(own), at.counted.get(client, -1),
        )  # fmt: skip
        if with_leaves:
            at.channel.deliver(number, client, delivery)
        node = self._directory.nodes[client]
        self._orders[node] = Asked(node, client, order, delivery if with_leaves else None)
        content = asked(order, delivery.leaves, delivery.folds) if with_leaves else asked(order, {}, [])
        return Message(content, node, kind, group_id=str(number + 1))

    def _exchange(self, messages: list[Message]) -> list[Message]:
        """Sends, and collects what is answered in time; the silent are named."""
        assert self.grid is not None, "start(grid) first"
        pushed = set(self.grid.push_messages(messages))  # a message has its id from then on
        self._sent = {m.metadata.message_id: self._orders[m.metadata.dst_node_id] for m in messages}
        nodes = {key: asked.node for key, asked in self._sent.items()}
        found, silent = answered(self.grid, pushed, nodes, self.network.round_timeout, self._pause)
        for key, why in silent.items():
            self._lost(self._sent[key].client, why)
        return found

    def _taken(self, reply: Message, take) -> None:
        """One reply: what it says is noted, or why it is left out."""
        _, client, order, delivery = self._sent[reply.metadata.reply_to_message_id]
        try:
            if reply.has_error():
                raise checks.RefusedError(reply.error.reason or "its app failed")
            take(client, order, reply)
        except checks.MALFORMED as error:
            text = checks.told(error)
            if text == STALE:
                self.at.channel.forget(client)
            self._lost(client, text)
        else:
            if delivery is not None:
                self.at.channel.holds(client, delivery)
            self._blamed.pop(client, None)

    def _upload(self, client: int, order: Order, reply: Message) -> None:
        checks.holding(order.holds, reply.content[HOLDS])
        rows, loss = checks.figures(reply.content[METRICS], order.round)
        f, turn = self.federation, self.federation.turn(order.round, client)
        crossed = unpack(reply.content[LEAVES], upload_limits(f.transport.max_upload_mb))
        self.watch(Event("turn", order.round, client, loss))
        try:
            upload = Received(turn, rows, f.transport.arrived(f.rules, self.at.shared, turn, crossed))
        except ValueError as error:
            return self.refuse_upload(Received(turn, rows, crossed), str(error))
        self.at.channel.collect(order.round, client, upload.tree, crossed)
        if (found := self.receive_upload(upload)) is not None:
            self.replies[client] = Reply(found, loss)

    def _score(self, client: int, order: Order, reply: Message) -> None:
        checks.holding(order.holds, reply.content[HOLDS])
        self.results[client] = checks.scores(reply.content[METRICS], order.round, self.federation.task.metric)

    def _lost(self, client: int, why: str) -> None:
        if why not in (self._blamed.get(client), self.absent.get(client)):  # said once a round
            self.watch(Event("absent", self._round, client, text=why))
        self._blamed[client] = why

    def _told(self, client: int | None, text: str) -> None:
        self.watch(Event("node", self._round, client, text=text))
