"""The reference engine: all clients in one process, one after the other, on one base model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from fedlora.engines.client_turn import ClientState, ClientTurn, ClientUpdate
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Event, Loop, Reply, ServerState
from fedlora.files import OffloadedTree
from fedlora.rounds import Received, client_start
from fedlora.security.validation import excluded_clients
from fedlora.training.evaluation import Scorer
from fedlora.types import Tree

NEW = ClientState({})  # before a client's first turn


@dataclass
class InProcess(Loop):
    """Runs all clients of a federation in this process."""

    offload: Path | None = None  # a folder for a round's uploads, instead of memory
    _states: dict[int, ClientState] = field(default_factory=dict, init=False)
    _before: dict[int, ClientState] = field(default_factory=dict, init=False)  # this round's turns
    _readings: dict[int, str] = field(default_factory=dict, init=False)  # of parties with their own data

    @classmethod
    def drive(cls, config, f, watch, observe, take):
        with TemporaryDirectory(prefix="fedlora-") as place:
            take(cls(watch, observe, Path(place) if config.engine.offload else None), f)

    def begin(self, f: Federation) -> ServerState:
        self._states = {}
        self._readings = {k: own.data.reading for k, own in f.parties.items() if own.data and own.data.reading}
        return super().begin(f)

    def readings(self) -> Mapping[int, str]:
        return self._readings

    def kept_trees(self) -> Mapping[int, Tree]:
        return {client: state.kept for client, state in self._states.items()}

    def undo_turn(self, client: int) -> None:
        self._states[client] = self._before[client]

    def client_states(self, at: ServerState):
        return dict(self._states)

    def restore(self, f: Federation, at: ServerState, states):
        if states is None:
            raise ValueError(
                "the clients' own states are on their machines; go on with the engine that ran this, "
                "by `flwr run` or `fedlora flower local` with the same folder."
            )
        self._states = dict(states)

    def run_turns(self, f: Federation, at: ServerState) -> list[Reply]:
        replies = []
        for client in f.cohort(at.number):
            turn = self.open_turn(f, at, client)
            if turn is None:
                continue
            state = self.state(client)
            reply = self.close_turn(f, at, turn, self.train(turn, at.shared, state))
            replies += [] if reply is None else [reply]
        return replies

    def open_turn(self, f: Federation, at: ServerState, client: int) -> ClientTurn | None:
        """Deliver the server's state to a client, and return its turn; None if the client has none in this round."""
        if client in excluded_clients(f.validation, at.conduct):
            return None
        state, turn = self.state(client), f.turn(at.number, client)
        own = client_start(f.rules, at.shared, state.kept, turn)
        delivery = at.channel.compute_delta(client, at.shared, at.base_updates, own)
        at.channel.record_delivery(at.number, client, delivery)
        if client in self.absent:
            return None  # it is not known to have arrived, so the next delivery has all of it again
        at.channel.confirm(client, delivery)
        return ClientTurn(f.for_client(client), turn, lambda: self.watch(Event("step", at.number, client)), key=f.key)

    def close_turn(self, f: Federation, at: ServerState, turn: ClientTurn, trained: ClientUpdate) -> Reply | None:
        """Encode a client's update and receive it at the server; None if the upload is quarantined."""
        client, state = turn.turn.client, self.state(turn.turn.client)
        update = turn.upload(at.shared, state, trained)
        self._before[client], self._states[client] = state, update.state
        at.channel.record_upload(at.number, client, update.decoded, update.sent)
        upload = self.receive_upload(Received(turn.turn, len(turn.federation.shards[client].train), update.decoded))
        if upload is None:
            return None
        if self.offload is not None:
            upload = upload._replace(tree=OffloadedTree(self.offload / f"{client}.safetensors", upload.tree))
        return Reply(upload, update.loss)

    def state(self, client: int) -> ClientState:
        """Return the state that a client keeps from its last turn."""
        return self._states.get(client, NEW)

    def train(self, client_turn: ClientTurn, shared: Tree, state: ClientState) -> ClientUpdate:
        """Train one client, measure the time and notify the watcher."""
        began, turn = time.perf_counter(), client_turn.turn
        trained = client_turn.train(shared, state)
        self.clock["train"] += time.perf_counter() - began
        self.watch(Event("turn", turn.round, turn.client, trained.loss))
        return trained

    def score_clients(self, f: Federation, at: ServerState, number: int, evaluator: Scorer | None):
        if evaluator is None and not f.parties:  # the callers' own trainers may have no test rows
            return {}
        scores = {}
        for client in range(f.clients.members):
            own, kept = f.for_client(client), self.state(client).kept
            scores[client] = own.score_client(evaluator or own.evaluator(), number, client, at.shared, kept)
        return scores
