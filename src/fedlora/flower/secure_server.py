"""The server of a federation with secure aggregation: it learns the mean of a round, and nobody's own upload."""

import time
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Message

from fedlora.engines.federation import Federation
from fedlora.engines.loop import Event, Reply, ServerState
from fedlora.engines.network_settings import Network
from fedlora.flower import replies as checks
from fedlora.flower import secure_client as hidden
from fedlora.flower.layout import Layout, layout_of, means, size
from fedlora.flower.server import Federated
from fedlora.flower.wire import HOLDS, METRICS
from fedlora.rounds import Received, Served, server_turn, shares
from fedlora.security.secure_aggregation import PHASES, ProtocolError, Server, TooFewClientsError
from fedlora.security.secure_aggregation import Message as Sealed


def served_by(network: Network) -> type[Federated]:
    """The server for these settings."""
    return Masked if network.secure_aggregation else Federated


@dataclass
class Masked(Federated):
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
        began, self._said = self._enter(at), ""
        order, wanted = self._wanted(f, at)
        least = max(3, self.network.secure_threshold or 0, min(self.network.min_clients, wanted))
        if at.number == self._first and self.network.min_clients < least:
            self.watch(Event("note", at.number, text=(
                f"flower.min_clients is {self.network.min_clients}; flower.secure_aggregation needs {least} clients "
                "to finish a round (flower.secure_threshold); with fewer, the round starts again"
            )))  # fmt: skip
        while not self._try_session(f, at, self._cohort(least, order, wanted), least):
            self._rest()
            self._quorum.check(least, set(order))
        return self._left(f, at, began)

    def _cohort(self, least: int, order: list[int], wanted: int) -> list[int]:
        """The clients of the next session: without those that failed in this round, unless too few are left."""
        here = [client for client in order if client in self._directory.here()]
        ready = [client for client in here if client not in self._quorum.failed]
        return sorted((ready if len(ready) >= least else here)[:wanted])

    def _try_session(self, f: Federation, at: ServerState, cohort: list[int], least: int) -> bool:
        """Runs one session; returns whether it succeeded, and reports why it did not."""
        if len(cohort) < least:
            self._say(f"{len(cohort)} of at least {least} clients are connected; waiting for more")
            return False
        try:
            self._summed(f, at, cohort)
        except ProtocolError as error:
            blamed = self.absent.keys() & set(cohort) or set(cohort)  # all of them, if the protocol names nobody
            self._quorum.failed = (self._quorum.failed - set(cohort)) | blamed
            self._say(f"{error}; the round starts again")
            return False
        return True

    def _rest(self) -> None:
        """Until other clients are here than before, or it is time to try again."""
        again, there = time.monotonic() + self.network.retry, self._directory.here()
        while self._directory.here() == there and time.monotonic() < again:
            self._pause()
            self._directory.refresh()

    def _say(self, text: str) -> None:
        """What the round waits for, once."""
        if text != self._said:
            self.watch(Event("waiting", self._round, text=text))
        self._said = text

    def _summed(self, f: Federation, at: ServerState, cohort: list[int]) -> None:
        """One session: everybody's vector, unmasked only as a sum. ``ProtocolError`` where too few stay to its end."""
        self.replies = {}
        turns = [f.turn(at.number, client) for client in cohort]
        layout = layout_of(f.rules, at.shared, turns)
        claims = f.hygiene.cap_examples([self._directory.rows[k] for k in cohort])
        weights = dict(zip(cohort, shares(f.method, claims)))
        if not layout:  # nobody sends anything: there is nothing to hide, and nothing to wait for but the turns
            return super()._ask(cohort, set())
        t, span = self.network.secure_threshold, self.network.secure_range
        server = Server.open(weights, size(layout), t, span, self.token, at.number)
        told: dict[int, Sealed | None] = dict.fromkeys(cohort)
        for phase in PHASES:
            messages = [self._phase(server, phase, k, sealed, layout) for k, sealed in told.items()]
            for reply in self._exchange(messages):
                self._taken(reply, lambda client, order, found, phase=phase: self._heard(server, phase, order, found))
            told = dict(server.close())
        found = server.outcome()
        least = min(weights[k] for k in found.numbers) / found.weight
        tree = checks.mean(f, means(layout, found.mean, least))
        self.mean = Received(f.turn(at.number, found.numbers[0]), 1, tree)
        self.replies = {k: self.replies[k] for k in found.numbers}

    def _phase(self, server: Server, phase: str, client: int, told: Sealed | None, layout: Layout) -> Message:
        message = self._message(client, self._round, "train", with_leaves=phase == "mask")
        message.content[hidden.PHASE] = ConfigRecord({hidden.PHASE: phase})
        if phase == PHASES[0]:
            message.content[hidden.SESSION] = ConfigRecord(server.session.record())
        if told is not None:
            message.content[hidden.TOLD] = ConfigRecord(told.record())
        if phase == "mask":
            message.content[hidden.LAYOUT] = hidden.layout_record(layout)
        return message

    def _heard(self, server: Server, phase: str, order, reply: Message) -> None:
        """One client's message of a phase; what the protocol refuses is left out, and with it the client."""
        content, client = reply.content, order.client
        said = Sealed(**content[hidden.SAID])
        if said.sender != client:
            raise checks.RefusedError(f"it answered as client {said.sender}")
        if phase == "mask":
            rows, loss = checks.figures(content[METRICS], order.round)
            checks.holding(order.holds, content[HOLDS])
            if self.federation.method.weighting == "examples" and rows != self._directory.rows[client]:
                raise checks.RefusedError(f"it trained on {rows} rows and had said {self._directory.rows[client]}")
            vector = torch.empty(server.session.size, dtype=torch.int32, device="meta")
            self.at.channel.collect(order.round, client, {"masked": {"": vector}})
            self.replies[client] = Reply(Received(self.federation.turn(order.round, client), rows, {}), loss)
            self.watch(Event("turn", order.round, client, loss))
        try:
            server.receive(said)
        except TooFewClientsError:
            raise
        except ProtocolError as error:
            self.replies.pop(client, None)
            raise checks.RefusedError(str(error)) from error
