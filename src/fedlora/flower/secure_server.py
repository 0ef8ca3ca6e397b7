"""The server of a federation with secure aggregation: it learns the mean of a round, and no client's own upload."""

import time
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Message

from fedlora.engines.federation import Federation
from fedlora.engines.loop import Event, Reply, ServerState
from fedlora.engines.network_settings import Network
from fedlora.flower import secure_client
from fedlora.flower.replies import check_holds, check_mean, read_figures
from fedlora.flower.server import FlowerLoop
from fedlora.flower.wire import (
    HOLDS,
    METRICS,
    Layout,
    Order,
    build_layout,
    encode_layout,
    from_vector,
    vector_size,
)
from fedlora.rounds import Received, Served, server_turn, shares
from fedlora.security.secure_aggregation import PHASES, ProtocolError, Server, TooFewClientsError
from fedlora.security.secure_aggregation import Message as Sealed
from fedlora.security.validation.expected import RefusedError


def select_loop(network: Network) -> type[FlowerLoop]:
    """Selects the server's loop for these settings."""
    return SecureFlowerLoop if network.secure_aggregation else FlowerLoop


@dataclass
class SecureFlowerLoop(FlowerLoop):
    """Each round is one session of four messages a client; the method combines the one mean that comes of it.

    For a method whose server only averages, the mean of a round is all that it needs: ``combine`` of one upload that
    is the mean is that mean. Clients may drop out at any step; the sum is over those whose masked vector arrived.
    """

    mean: Received | None = field(default=None, init=False)
    _said: str = field(default="", init=False)

    def is_measured(self, f: Federation) -> bool:
        return False  # there is nothing to measure a mean against

    def aggregate(self, f: Federation, at: ServerState, uploads: list[Received]) -> Served:
        return server_turn(f.rules, at.shared, uploads)  # with privacy, the clients' own noise is in it

    def select_uploads(self, replies: list[Reply]) -> list[Received]:
        return [self.mean] if self.mean is not None else []

    def run_turns(self, f: Federation, at: ServerState) -> list[Reply]:
        began, self._said = self._begin_turns(at), ""
        order, wanted = self._order(f, at)
        least = max(3, self.network.secure_threshold or 0, min(self.network.min_clients, wanted))
        if at.number == self._first and self.network.min_clients < least:
            self.watch(Event("note", at.number, text=(
                f"flower.min_clients is {self.network.min_clients}; flower.secure_aggregation needs {least} clients "
                "to finish a round (flower.secure_threshold); with fewer, the round starts again"
            )))  # fmt: skip
        while not self._try_session(f, at, self._cohort(least, order, wanted), least):
            self._rest()
            self._quorum.check(least, set(order))
        return self._end_turns(f, at, began)

    def _cohort(self, least: int, order: list[int], wanted: int) -> list[int]:
        """The clients of the next session: without those that failed in this round, unless too few are left."""
        here = [client for client in order if client in self._registry.connected_clients()]
        ready = [client for client in here if client not in self._quorum.failed]
        return sorted((ready if len(ready) >= least else here)[:wanted])

    def _try_session(self, f: Federation, at: ServerState, cohort: list[int], least: int) -> bool:
        """Runs one session; returns whether it succeeded, and reports why it did not."""
        if len(cohort) < least:
            self._say(f"{len(cohort)} of at least {least} clients are connected; waiting for more")
            return False
        try:
            self._run_session(f, at, cohort)
        except ProtocolError as error:
            blamed = self.absent.keys() & set(cohort) or set(cohort)  # all of them, if the protocol names nobody
            self._quorum.failed = (self._quorum.failed - set(cohort)) | blamed
            self._say(f"{error}; the round starts again")
            return False
        return True

    def _rest(self) -> None:
        """Waits until other clients are connected than before, or it is time to try again."""
        again, there = time.monotonic() + self.network.retry, self._registry.connected_clients()
        while self._registry.connected_clients() == there and time.monotonic() < again:
            self._pause()
            self._registry.refresh()

    def _say(self, text: str) -> None:
        """Reports the reason why the round waits, once."""
        if text != self._said:
            self.watch(Event("waiting", self._round, text=text))
        self._said = text

    def _run_session(self, f: Federation, at: ServerState, cohort: list[int]) -> None:
        """Runs one session: the sum of all vectors. ``ProtocolError`` where too few clients stay to its end."""
        self.replies = {}
        turns = [f.turn(at.number, client) for client in cohort]
        layout = build_layout(f.rules, at.shared, turns)
        claims = f.validation.cap_examples([self._registry.rows[k] for k in cohort])
        weights = dict(zip(cohort, shares(f.method, claims)))
        if not layout:  # nobody sends anything: there is nothing to hide, and nothing to wait for but the turns
            return super()._ask(cohort, set())
        t, span = self.network.secure_threshold, self.network.secure_range
        server = Server.open(weights, vector_size(layout), t, span, self.token, at.number)
        requests: dict[int, Sealed | None] = dict.fromkeys(cohort)
        for phase in PHASES:
            messages = [self._phase_message(server, phase, k, sealed, layout) for k, sealed in requests.items()]
            for reply in self._send_and_receive(messages):
                self._take_in(
                    reply, lambda client, order, found, phase=phase: self._receive(server, phase, order, found)
                )
            requests = dict(server.close())
        found = server.outcome()
        least = min(weights[k] for k in found.numbers) / found.weight
        tree = check_mean(f.rules, from_vector(layout, found.mean, least))
        self.mean = Received(f.turn(at.number, found.numbers[0]), 1, tree)
        self.replies = {k: self.replies[k] for k in found.numbers}

    def _phase_message(
        self, server: Server, phase: str, client: int, request: Sealed | None, layout: Layout
    ) -> Message:
        message = self._message(client, self._round, "train", with_leaves=phase == "mask")
        message.content[secure_client.PHASE] = ConfigRecord({secure_client.PHASE: phase})
        if phase == PHASES[0]:
            message.content[secure_client.SESSION] = ConfigRecord(server.session.record())
        if request is not None:
            message.content[secure_client.REQUEST] = ConfigRecord(request.record())
        if phase == "mask":
            message.content[secure_client.LAYOUT] = encode_layout(layout)
        return message

    def _receive(self, server: Server, phase: str, order: Order, reply: Message) -> None:
        """Takes one client's message of a phase. A client whose message the protocol refuses is left out."""
        content, client = reply.content, order.client
        response = Sealed(**content[secure_client.RESPONSE])
        if response.sender != client:
            raise RefusedError(f"it answered as client {response.sender}")
        if phase == "mask":
            rows, loss = read_figures(content[METRICS], order.round)
            check_holds(order.holds, content[HOLDS])
            if self.federation.method.weighting == "examples" and rows != self._registry.rows[client]:
                raise RefusedError(f"it trained on {rows} rows and had said {self._registry.rows[client]}")
            upload = torch.empty(server.session.size, dtype=torch.int32, device="meta")
            self.at.channel.record_upload(order.round, client, {"masked": {"": upload}})
            self.replies[client] = Reply(Received(self.federation.turn(order.round, client), rows, {}), loss)
            self.watch(Event("turn", order.round, client, loss))
        try:
            server.receive(response)
        except TooFewClientsError:
            raise
        except ProtocolError as error:
            self.replies.pop(client, None)
            raise RefusedError(str(error)) from error
