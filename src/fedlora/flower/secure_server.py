"""The server of a federation with secure aggregation: it learns the mean of a round, and no single upload."""

import time
from dataclasses import dataclass, field
from functools import partial

import torch
from flwr.app import ConfigRecord, Message

from fedlora.engines.federation import Federation
from fedlora.engines.loop import Event, Reply, ServerState
from fedlora.engines.network_settings import Network
from fedlora.flower.replies import read_figures, read_metrics
from fedlora.flower.secure_client import LAYOUT, PHASE, REQUEST, RESPONSE, SESSION
from fedlora.flower.server import FlowerLoop
from fedlora.flower.wire import Layout, Order, build_layout, encode_layout, from_vector, vector_size
from fedlora.rounds import Received, Served, server_turn, shares
from fedlora.security.secure_aggregation import PHASES, ProtocolError, SecureServer, TooFewClientsError
from fedlora.security.secure_aggregation import Message as SecureMessage
from fedlora.security.validation.expected import RefusedError


def select_loop(network: Network) -> type[FlowerLoop]:
    """Return the class of the server's loop for these settings."""
    return SecureFlowerLoop if network.secure_aggregation else FlowerLoop


@dataclass
class SecureFlowerLoop(FlowerLoop):
    """Runs each round as one session of four messages per client; the method combines the resulting mean.

    A method whose server only averages needs nothing else: ``combine`` of one upload that is the mean returns the mean.
    Clients may drop out at any step; the sum is over the clients whose masked vector arrived.
    """

    mean: Received | None = field(default=None, init=False)

    def is_measured(self, f: Federation) -> bool:
        return False  # the errors are relative to single uploads

    def aggregate(self, f: Federation, at: ServerState, uploads: list[Received]) -> Served:
        return server_turn(f.rules, at.shared, uploads)  # with privacy, the mean has the clients' own noise

    def select_uploads(self, replies: list[Reply]) -> list[Received]:
        return [self.mean] if self.mean is not None else []

    def _collect_replies(self, f: Federation, at: ServerState, order: list[int], wanted: int) -> None:
        """Run sessions until one succeeds. After each, wait for other connected clients, or until ``retry`` is over."""
        least = max(3, self.network.secure_threshold or 0, min(self.network.min_clients, wanted))
        if at.number == self._first and self.network.min_clients < least:
            self.watch(Event("note", at.number, text=(
                f"flower.min_clients is {self.network.min_clients}; flower.secure_aggregation needs {least} clients "
                "to finish a round (flower.secure_threshold); with fewer, the round starts again"
            )))  # fmt: skip
        last = ""
        while failure := self._try_session(f, at, order, wanted, least):
            if failure != last:
                self.watch(Event("waiting", at.number, text=failure))
            last = failure
            again, before = time.monotonic() + self.network.retry, self._registry.connected_clients()
            while self._registry.connected_clients() == before and time.monotonic() < again:
                self._pause()
                self._registry.refresh()
            self._quorum.check(least, set(order))

    def _try_session(self, f: Federation, at: ServerState, order: list[int], wanted: int, least: int) -> str:
        """Run one session, without the clients that failed in this round unless too few remain.

        Returns the reason why it failed, or an empty string.
        """
        here = [client for client in order if client in self._registry.connected_clients()]
        ready = [client for client in here if client not in self._quorum.failed]
        cohort = sorted((ready if len(ready) >= least else here)[:wanted])
        if len(cohort) < least:
            return f"{len(cohort)} of at least {least} clients are connected; waiting for more"
        try:
            self._run_session(f, at, cohort)
        except ProtocolError as error:
            blamed = self.absent.keys() & set(cohort) or set(cohort)  # all of them, if the protocol names no client
            self._quorum.failed = (self._quorum.failed - set(cohort)) | blamed
            return f"{error}; the round starts again"
        return ""

    def _run_session(self, f: Federation, at: ServerState, cohort: list[int]) -> None:
        """Run one session: the sum of all vectors. Raises ``ProtocolError`` if too few clients stay to its end."""
        self.replies = {}
        layout = build_layout(f.rules, at.shared, [f.turn(at.number, client) for client in cohort])
        claims = f.validation.cap_examples([self._registry.rows[k] for k in cohort])
        weights = dict(zip(cohort, shares(f.method, claims)))
        if not layout:  # no client sends anything, so only the turns themselves are needed
            return super()._ask(cohort, set())
        threshold, span = self.network.secure_threshold, self.network.secure_range
        server = SecureServer.open(weights, vector_size(layout), threshold, span, self.token, at.number)
        requests: dict[int, SecureMessage | None] = dict.fromkeys(cohort)
        for phase in PHASES:
            messages = [self._phase_message(server, phase, k, request, layout) for k, request in requests.items()]
            for reply in self._send_and_receive(messages):
                self._process_reply(reply, partial(self._process_response, server, phase))
            requests = dict(server.close())
        outcome = server.outcome()
        least = min(weights[k] for k in outcome.numbers) / outcome.weight
        mean = from_vector(layout, outcome.mean, least)
        tree = {part: mean.get(part, {}) for part in f.rules}
        self.mean = Received(f.turn(at.number, outcome.numbers[0]), 1, tree)
        self.replies = {k: self.replies[k] for k in outcome.numbers}

    def _phase_message(
        self, server: SecureServer, phase: str, client: int, request: SecureMessage | None, layout: Layout
    ) -> Message:
        message = self._message(client, self._round, "train", with_leaves=phase == "mask")
        message.content[PHASE] = ConfigRecord({PHASE: phase})
        if phase == PHASES[0]:
            message.content[SESSION] = ConfigRecord(server.session.record())
        if request is not None:
            message.content[REQUEST] = ConfigRecord(request.record())
        if phase == "mask":
            message.content[LAYOUT] = encode_layout(layout)
        return message

    def _process_response(self, server: SecureServer, phase: str, order: Order, reply: Message) -> None:
        """Process one client's message of a phase. A client whose message the protocol refuses is left out."""
        content, client = reply.content, order.client
        response = SecureMessage(**content[RESPONSE])
        if response.sender != client:
            raise RefusedError(f"it answered as client {response.sender}")
        if phase == "mask":
            rows, loss = read_figures(read_metrics(order, content), self.terms is not None)
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
