"""The reference engine: all clients in one process, one after the other, on one base model."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from fedlora.engines import privacy as private
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Event, Loop, Private, Reply, Standing
from fedlora.files import Spilled
from fedlora.rounds import Received, client_turn, received
from fedlora.security.attacks._base import leaving
from fedlora.security.validation import barred
from fedlora.training.evaluation import Evaluator
from fedlora.training.local import State
from fedlora.types import Tree


@dataclass
class InProcess(Loop):
    """Runs a federation where it stands."""

    spill: Path | None = None  # a folder for a round's uploads, instead of memory
    _kept: dict[int, Tree] = field(default_factory=dict, init=False)
    _moments: dict[int, State | None] = field(default_factory=dict, init=False)
    _before: dict[int, tuple[Tree, State | None]] = field(default_factory=dict, init=False)  # this round's turns

    @classmethod
    def drive(cls, config, f, watch, observe, take):
        with TemporaryDirectory(prefix="fedlora-") as place:
            take(cls(watch, observe, Path(place) if config.engine.spill else None), f)

    def begin(self, f: Federation) -> Standing:
        self._kept, self._moments = {}, {}
        return super().begin(f)

    def kept(self):
        return self._kept

    def undone(self, client: int) -> None:
        self._kept[client], self._moments[client] = self._before[client]

    def privates(self, at: Standing):
        return {client: Private(kept, self._moments.get(client)) for client, kept in self._kept.items()}

    def resumed(self, f: Federation, at: Standing, privates):
        if privates is None:
            raise ValueError(
                "what the clients keep for themselves is on their own machines; go on with the engine that ran this, "
                "by `flwr run` or `fedlora flower local` with the same folder."
            )
        self._kept = {client: private.kept for client, private in privates.items()}
        self._moments = {client: private.moments for client, private in privates.items()}

    def turns(self, f: Federation, at: Standing) -> list[Reply]:
        replies = []
        for client in f.cohort(at.number):
            if client in barred(f.hygiene, at.conduct):
                continue
            own = received(f.rules, at.shared, self._kept.get(client, {}), f.turn(at.number, client))
            delivery = at.channel.lacking(client, at.shared, at.folds, own)
            at.channel.deliver(at.number, client, delivery)
            if client in self.absent:
                continue  # and nobody knows what arrived: next time it is sent everything that it may lack
            at.channel.holds(client, delivery)
            kept, turn = self._kept.get(client, {}), f.turn(at.number, client)
            self._before[client] = kept, self._moments.get(client)
            sent, stays, loss, self._moments[client] = self._turn(
                f, at.number, client, at.shared, kept, self._moments.get(client)
            )
            crossed, sent, self._kept[client] = f.transport.sent(f.rules, at.shared, kept, turn, sent, stays)
            at.channel.collect(at.number, client, sent, crossed)
            upload = self.arrived(Received(turn, len(f.shards[client].train), sent))
            if upload is None:
                continue
            if self.spill is not None:
                upload = upload._replace(tree=Spilled(self.spill / f"{client}.safetensors", upload.tree))
            replies.append(Reply(upload, loss))
        return replies

    def scores(self, f: Federation, at: Standing, number: int, evaluator: Evaluator | None):
        assert evaluator is not None, "all rows are here"
        return {
            client: f.scores(evaluator, number, client, at.shared, self._kept.get(client, {}))
            for client in range(f.clients.members)
        }

    def _turn(self, f: Federation, number: int, client: int, shared: Tree, kept: Tree, moments: State | None):
        sent, stays, loss, moments = self._trained(f, number, client, shared, kept, moments)
        return leaving(f.attack, f.rules, shared, kept, sent, f.turn(number, client)), stays, loss, moments

    def _trained(self, f: Federation, number: int, client: int, shared: Tree, kept: Tree, moments: State | None):
        began = time.perf_counter()
        trainer = private.trainer(f, number, client, moments, lambda: self.watch(Event("step", number, client)), None)
        sent, stays = client_turn(f.rules, shared, kept, trainer.turn, trainer)
        sent = private.leaving(f, number, client, shared, sent)
        self.clock["train"] += time.perf_counter() - began
        self.watch(Event("turn", number, client, trainer.loss))
        return sent, stays, trainer.loss, trainer.state
