"""One client's turn in a round: receive, train, clip and add noise, attack, encode. Every engine runs it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fedlora.engines.federation import Federation
from fedlora.rounds import client_start, client_turn, finish_turn
from fedlora.security.attacks._base import alter_upload, poison_task
from fedlora.security.privacy import Stream
from fedlora.security.privacy.client_level import protect
from fedlora.security.privacy.dp_sgd import PrivateTrainer
from fedlora.training.local import LocalTrainer, OptimizerState
from fedlora.training.own_trainer import OwnTrainer
from fedlora.types import Tree, Turn, Work


class ClientState(NamedTuple):
    """The state that a client keeps from turn to turn and does not send."""

    kept: Tree
    moments: OptimizerState | None = None  # of its optimizer, if training.keep_optimizer is set


class ClientUpdate(NamedTuple):
    """The result of a turn."""

    sent: Tree  # encoded, for the wire
    decoded: Tree  # as the server decodes it
    state: ClientState
    loss: float | None  # None: the caller's own trainer did not return one


@dataclass(frozen=True)
class ClientTurn:
    """A client's turn in a round: ``train``, then ``upload``.

    ``key`` is the client's own key for noise; the default is the federation's. If the server learns only a sum,
    ``summed`` is the number of clients that share the noise.
    """

    federation: Federation
    turn: Turn
    step_done: Callable[[], None] = lambda: None
    key: bytes | None = None
    summed: int = 0

    def run(self, shared: Tree, state: ClientState) -> ClientUpdate:
        """Train from the server's tree and the client's own state, and encode the upload."""
        return self.upload(shared, state, self.train(shared, state))

    def train(self, shared: Tree, state: ClientState) -> ClientUpdate:
        """Receive, train locally, then clip and add noise if the client has to."""
        trainer = self.build_trainer(state.moments)
        sent, kept = client_turn(self.federation.rules, shared, state.kept, self.turn, trainer)
        return self._protect_update(shared, sent, ClientState(kept, trainer.state), trainer.loss)

    def start(self, shared: Tree, state: ClientState) -> Tree:
        """Return the leaves that the client's training starts from."""
        return client_start(self.federation.rules, shared, state.kept, self.turn)

    def finish(self, shared: Tree, work: Mapping[str, Work], loss: float | None) -> ClientUpdate:
        """Return the upload and the client's next state after training in a loop of the caller."""
        sent, kept = finish_turn(self.federation.rules, work, self.turn)
        return self._protect_update(shared, sent, ClientState(kept), loss)

    def _protect_update(self, shared: Tree, sent: Tree, state: ClientState, loss: float | None) -> ClientUpdate:
        sent = self._protect(shared, sent)
        return ClientUpdate(sent, sent, state, loss)

    def upload(self, shared: Tree, state: ClientState, trained: ClientUpdate) -> ClientUpdate:
        """Apply the attack, if this client is an attacker, and encode; ``state`` is the one before the turn."""
        f = self.federation
        sent = alter_upload(f.attack, f.rules, shared, state.kept, trained.sent, self.turn)
        encoded, decoded, kept = f.compression.encode_upload(
            f.rules, shared, state.kept, self.turn, sent, trained.state.kept
        )
        return ClientUpdate(encoded, decoded, ClientState(kept, trained.state.moments), trained.loss)

    def build_trainer(self, moments: OptimizerState | None = None) -> LocalTrainer | OwnTrainer:
        """Return the client's local trainer of this round, with DP-SGD if single rows are protected."""
        f, turn = self.federation, self.turn
        if f.trainers is not None:
            return f.trainers.build_turn(turn, f.rounds, moments, self.step_done)
        assert f.data is not None, "clients train on rows"
        kind, private = LocalTrainer, {}
        if f.privacy.by_example:
            noise = f.privacy_ledger.noise_multiplier
            kind, private = PrivateTrainer, {"clip": f.privacy.clip, "noise": noise, "stream": self._stream}
        return kind(
            f.model, poison_task(f.attack, f.task, turn), f.data.train, f.shards[turn.client],
            f.training_of(turn.round, turn.client), turn, f.rounds, moments, self.step_done, **private,
        )  # fmt: skip

    @cached_property
    def _stream(self) -> Stream:
        return Stream(self.federation.key if self.key is None else self.key).child("client", self.turn.client)

    def _protect(self, shared: Tree, sent: Tree) -> Tree:
        """Clip the change and add noise, if client-level noise is added here rather than at the server."""
        f, p = self.federation, self.federation.privacy
        if not p.by_client or not (self.summed or p.noise_on == "upload"):
            return sent
        part = math.sqrt(1 / self.summed) if self.summed and p.noise_on == "sum" else 1.0
        std = f.privacy_ledger.noise_multiplier * p.clip * part
        return protect(f.rules, shared, self.turn, sent, p.clip, std, self._stream)
