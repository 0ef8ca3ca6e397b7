"""The server: rounds over a Flower grid, with the clients that are connected.

A round asks its cohort. A client that fails, is late or disconnects is left out and reported, and the weights of the
others are renormalised. With fewer than ``min_clients`` good uploads, the round keeps these, waits, and asks the
clients that come back.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora.engines.base_updates import BaseUpdate
from fedlora.engines.client_turn import ClientState
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Event, Loop, Reply, Round, ServerState
from fedlora.engines.network_settings import Network
from fedlora.files import digest, upload_limits
from fedlora.flower.client import digest_start
from fedlora.flower.client_messages import STALE
from fedlora.flower.client_store import LocalClients, name_base, select_leaves
from fedlora.flower.node_registry import GONE, NodeRegistry, Quorum
from fedlora.flower.replies import MALFORMED, describe_refusal, read_figures, read_metrics, read_scores
from fedlora.flower.terms import Terms
from fedlora.flower.wire import LEAVES, Order, SentOrder, add_round, encode_order, record_to_tree
from fedlora.rounds import Received, Served
from fedlora.security.validation import excluded_clients
from fedlora.security.validation.expected import RefusedError
from fedlora.tasks._base import Scores
from fedlora.tasks.data.labels import NAME, describe_positions
from fedlora.training.evaluation import Evaluator


@dataclass
class FlowerLoop(Loop, Strategy):
    """The round loop of a federation as a Flower strategy, run by ``start(grid)``, or by ``run`` if it has a grid."""

    federation: Federation = field(kw_only=True)
    network: Network = field(default_factory=Network, kw_only=True)
    token: str = field(default="run", kw_only=True)  # of this run: clients keep their state under it
    grid: Grid | None = field(default=None, kw_only=True)
    terms: Terms | None = field(default=None, kw_only=True)  # for clients with trainers of their own
    local: LocalClients | None = field(default=None, kw_only=True)  # the clients' states, if they are on this machine
    registry: NodeRegistry | None = field(default=None, init=False)
    at: ServerState | None = field(default=None, init=False)
    replies: dict[int, Reply] = field(default_factory=dict, init=False)  # of the current round
    results: dict[int, Scores] = field(default_factory=dict, init=False)
    stopped: bool = field(default=False, init=False)  # set by another thread
    _first: int = field(default=0, init=False)  # the round with which the run begins or resumes
    _bases: list[str] = field(default_factory=lambda: [""], init=False)  # number of base updates -> name of the base
    _round: int = field(default=0, init=False)
    _blamed: dict[int, str] = field(default_factory=dict, init=False)  # client -> why it is left out
    _orders: dict[int, SentOrder] = field(default_factory=dict, init=False)  # node -> its last order
    _sent: dict[str, SentOrder] = field(default_factory=dict, init=False)  # message id -> its order

    # ------------------------------------------------------------------------------ as an engine
    def begin(self, f: Federation) -> ServerState:
        self._connect()
        self._bases = [""]
        return super().begin(f)

    def _connect(self) -> NodeRegistry:
        """Make the registry, before any base update is applied: it has a digest of the pretrained weights."""
        assert self.grid is not None, "start(grid) first"
        self.registry = NodeRegistry(
            self.grid, self.federation.clients.members, self.token,
            digest_start(self.federation, self.terms.spec if self.terms else None),
            lambda client, text: self.watch(Event("node", self._round, client, text=text)),
            self._describe_reading, self.terms.to_records() if self.terms else {}, self.network.retry, self._pause,
        )  # fmt: skip
        return self.registry

    @property
    def _registry(self) -> NodeRegistry:
        return self.registry or self._connect()

    def readings(self) -> Mapping[int, str]:
        return {} if self.registry is None or not self.federation.clients.own_data else self.registry.readings

    def _describe_reading(self, reading: str) -> str:
        """Describe how a client with its own data reads its labels, for the message that it joined."""
        f = self.federation
        if not reading or not f.clients.own_data:
            return ""
        if reading == NAME:
            return "; its labels are matched by name"
        return f"; its labels are numbers and read as positions, {describe_positions(f.task.all_labels())}"

    def _combine(self, f: Federation, at: ServerState, uploads: list[Received]) -> Served:
        served = super()._combine(f, at, uploads)
        if served.base_updates:
            self._bases.append(name_base(self._bases[-1], at.base_updates.entries[-1]))
        return served

    def client_states(self, at: ServerState) -> Mapping[int, ClientState] | None:
        return None if self.local is None else self.local.client_states(at)

    def on_base_update(self, base_updates: BaseUpdate) -> None:
        self._bases.append(name_base(self._bases[-1], base_updates))
        if self.local is not None:
            self.local.add_base_update(base_updates)

    def restore(self, f: Federation, at: ServerState, states: Mapping[int, ClientState] | None) -> None:
        if self.local is not None and states is not None:
            self.local.restore(f, at, states, self._bases)

    def is_measured(self, f: Federation) -> bool:
        return super().is_measured(f) and not f.method.personal  # the leaves that clients keep are not on the server

    def run(self, f: Federation, at: ServerState | None = None) -> Iterator[Round]:
        at = at or self.begin(f)
        self._first = at.number
        return super().run(f, at)

    def run_turns(self, f: Federation, at: ServerState) -> list[Reply]:
        with self._time_phase("train"):
            self._begin_turns(at)
            self._collect_replies(f, at, *self._select_order(f, at))
        for client in sorted(set(f.cohort(at.number)) - self.replies.keys() - self.screen.rejected.keys()):
            self._lose(client, self.absent.get(client, GONE))
        return [self.replies[client] for client in sorted(self.replies)]

    def _collect_replies(self, f: Federation, at: ServerState, order: list[int], wanted: int) -> None:
        """Ask the clients, in ``order``, for ``wanted`` uploads, until at least ``min_clients`` have answered."""
        least, tried = min(self.network.min_clients, wanted), set[int]()
        while True:
            self._quorum.check(least, set(order), self.replies.keys())
            here = self._registry.connected_clients() - tried
            self._ask([client for client in order if client in here][: wanted - len(self.replies)], tried)
            if len(self.replies) >= least:
                return
            self._wait(least, tried, set(order))

    def _select_order(self, f: Federation, at: ServerState) -> tuple[list[int], int]:
        """Return the clients that may train, in order, and the number of uploads to collect.

        Neither quarantined clients nor drawn dropouts are replaced by others. A dropout still gets its order.
        """
        excluded = excluded_clients(f.validation, at.conduct)
        dropouts = set(f.clients.draw_dropouts(at.number, f.seed))
        if dropped := sorted(dropouts & self._registry.connected_clients() - excluded):
            self._ask(dropped, set())
        order = [client for client in f.order(at.number) if client not in self.absent.keys() | excluded]
        return order, len(set(f.clients.remaining(at.number, f.cohort_seed)) - excluded)

    def _begin_turns(self, at: ServerState) -> None:
        """Begin a round; the first round waits for all clients."""
        self.at, self.replies, self._blamed, self._round = at, {}, self.absent, at.number
        self._quorum = Quorum(self._registry, at.number, self.network.repair_timeout, self.watch, self.absent)
        if at.number == self._first:
            self._registry.wait(self.network.join_timeout)
        else:
            self._registry.refresh()

    def score_clients(
        self, f: Federation, at: ServerState, number: int, evaluator: Evaluator | None
    ) -> Mapping[int, Scores]:
        if self.terms is not None and not self.terms.spec.has_scores:
            return {}
        self.at, self.results, self._blamed, self._round = at, {}, self.unscored, number
        self._registry.refresh()
        orders = self.configure_evaluate(number + 1, None, None, self.grid)
        self.aggregate_evaluate(number + 1, self._send_and_receive(orders))
        for client in sorted(set(range(f.clients.members)) - self.results.keys() - self.unscored.keys()):
            self._lose(client, GONE)
        return dict(sorted(self.results.items()))

    # --------------------------------------------------------------------- as a Flower strategy
    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Run the federation to its end. Other arguments of Flower's ``start`` are ignored: the federation has them."""
        self.grid, result = grid, Result()
        for done in self.run(self.federation):
            add_round(result, done)
        return result

    def configure_train(self, server_round: int, arrays, config, grid, clients: Iterable[int] = ()) -> list[Message]:
        """Return each client's order for a round, with the leaves and base updates that it lacks."""
        return [self._message(client, server_round - 1, "train") for client in clients]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """Process the replies with uploads; ``run`` combines the uploads."""
        for reply in replies:
            self._process_reply(reply, self._process_upload)
        return None, None

    def configure_evaluate(self, server_round: int, arrays, config, grid) -> list[Message]:
        """Return the order to evaluate after a round, for each connected client."""
        return [self._message(k, server_round - 1, "evaluate") for k in sorted(self._registry.connected_clients())]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]):
        """Process the replies with scores."""
        for reply in replies:
            self._process_reply(reply, self._process_scores)

    def summary(self) -> None:
        """Print nothing: the run's folder describes it."""

    def _ask(self, clients: list[int], tried: set[int]) -> None:
        """Ask clients for a turn, and ask again those whose state is older than expected."""
        tried |= set(clients)
        self._quorum.failed |= set(clients)  # until they have answered
        for _ in range(2):
            messages = self.configure_train(self._round + 1, None, None, self.grid, clients)
            self.aggregate_train(self._round + 1, self._send_and_receive(messages))
            clients = [client for client in clients if self.absent.get(client) == STALE]
            if not clients:
                return

    def _wait(self, least: int, tried: set[int], able: set[int]) -> None:
        """Wait until a new client connects, one comes back, or it is time to ask the others again."""
        gone = tried - self._registry.connected_clients()
        text = f"{len(self.replies)} of at least {least} clients have answered; waiting for more"
        self.watch(Event("waiting", self._round, text=text))
        again = time.monotonic() + self.network.retry
        while not (self._registry.connected_clients() & able) - tried:
            self._quorum.check(least, able, self.replies.keys())
            self._pause()
            self._registry.refresh()
            back = gone & self._registry.connected_clients() - self.replies.keys()
            self._quorum.failed -= back
            gone |= tried - self._registry.connected_clients()
            tried -= back if time.monotonic() < again else tried - self.replies.keys()

    def _pause(self) -> None:
        """Sleep between two refreshes. Raises ``KeyboardInterrupt`` if another thread has stopped the loop."""
        time.sleep(self.network.poll)
        if self.stopped:
            raise KeyboardInterrupt

    def _message(self, client: int, number: int, kind: str, with_leaves: bool = True) -> Message:
        f, at, node = self.federation, self.at, self._registry.nodes[client]
        leaves = select_leaves(f.rules, at.shared, f.budgets[client])
        if not at.channel.is_known(client):
            count, base = self._registry.base_updates_held.pop(client, (0, ""))
            is_known = at.base_updates.start <= count <= len(at.base_updates) and self._bases[count] == base
            at.channel.forget(client, count if is_known else 0)
        delivery = at.channel.compute_delta(client, at.shared, at.base_updates, leaves)
        order = Order(
            self.token, number, client, not at.channel.is_known(client), delivery.first, delivery.after,
            self._bases[delivery.first], self._bases[delivery.after], digest(leaves), at.counted.get(client, -1),
        )  # fmt: skip
        self._orders[node] = SentOrder(node, order, delivery if with_leaves else None)
        if with_leaves:
            at.channel.record_delivery(number, client, delivery)
        return Message(encode_order(order, self._orders[node].delivery), node, kind, group_id=str(number + 1))

    def _send_and_receive(self, messages: list[Message]) -> list[Message]:
        """Send messages, and return the replies within ``round_timeout``. Clients that do not answer are reported."""
        pushed = set(self.grid.push_messages(messages))  # a message has its id from here on
        self._sent = {m.metadata.message_id: self._orders[m.metadata.dst_node_id] for m in messages}
        for key in self._sent.keys() - pushed:
            self._lose(self._sent[key].order.client, "its node cannot be reached")
        waiting, replies = pushed & self._sent.keys(), list[Message]()
        end = time.monotonic() + self.network.round_timeout
        while waiting and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(waiting)):
                if reply.metadata.reply_to_message_id in waiting:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    replies.append(reply)
            # A node that has disconnected does not know of the message when it is started again.
            connected = set(self.grid.get_node_ids())
            for key in [key for key in waiting if self._sent[key].node not in connected]:
                waiting.discard(key)
                self._lose(self._sent[key].order.client, "its node was gone while it was asked")
            if waiting:
                self._pause()
        for key in waiting:
            self._lose(self._sent[key].order.client, f"no answer within {self.network.round_timeout:g} seconds")
        return replies

    def _process_reply(self, reply: Message, process: Callable[[Order, Message], None]) -> None:
        """Process one reply, or report why it is left out."""
        _, order, delivery = self._sent[reply.metadata.reply_to_message_id]
        try:
            if reply.has_error():
                raise RefusedError(reply.error.reason or "its app failed")
            process(order, reply)
        except MALFORMED as error:
            text = describe_refusal(error)
            if text == STALE:
                self.at.channel.forget(order.client)
            self._lose(order.client, text)
        else:
            if delivery is not None:
                self.at.channel.confirm(order.client, delivery)
            self._blamed.pop(order.client, None)

    def _process_upload(self, order: Order, reply: Message) -> None:
        rows, loss = read_figures(read_metrics(order, reply.content), self.terms is not None)
        f, client, turn = self.federation, order.client, self.federation.turn(order.round, order.client)
        encoded = record_to_tree(reply.content[LEAVES], upload_limits(f.compression.max_upload_mb))
        self.watch(Event("turn", order.round, client, loss))
        try:
            upload = Received(turn, rows, f.compression.decode_upload(f.rules, self.at.shared, turn, encoded))
        except ValueError as error:
            return self.refuse_upload(Received(turn, rows, encoded), str(error))
        self.at.channel.record_upload(order.round, client, upload.tree, encoded)
        if (screened := self.receive_upload(upload)) is not None:
            self.replies[client] = Reply(screened, loss)

    def _process_scores(self, order: Order, reply: Message) -> None:
        metrics = read_metrics(order, reply.content)
        task = self.federation.task
        self.results[order.client] = read_scores(metrics, task.metric, task.is_own_code)

    def _lose(self, client: int, why: str) -> None:
        """Leave a client out of the round. A reason is reported once a round."""
        if why not in (self._blamed.get(client), self.absent.get(client)):
            self.watch(Event("absent", self._round, client, text=why))
        self._blamed[client] = why
