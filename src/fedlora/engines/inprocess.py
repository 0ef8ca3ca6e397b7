"""The reference engine: all clients in one process, one after the other, on one base model."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.engines.loop import Event, Federation, Loop, Private, Reply, Standing
from fedlora.evaluation import Evaluator
from fedlora.rounds import Received, client_turn, received
from fedlora.state import Spilled
from fedlora.training import LocalTrainer, State
from fedlora.types import Tree


@dataclass
class InProcess(Loop):
    """Runs a federation where it stands."""

    spill: Path | None = None  # a folder for a round's uploads, instead of memory
    _kept: dict[int, Tree] = field(default_factory=dict, init=False)
    _moments: dict[int, State | None] = field(default_factory=dict, init=False)

    def begin(self, f: Federation) -> Standing:
        self._kept, self._moments = {}, {}
        return super().begin(f)

    def kept(self):
        return self._kept

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
        for client in f.clients.cohort(at.number, f.seed):
            own = received(f.rules, at.shared, self._kept.get(client, {}), f.turn(at.number, client))
            delivery = at.channel.lacking(client, at.shared, at.folds, own)
            at.channel.deliver(at.number, client, delivery)
            if client in self.absent:
                continue  # and nobody knows what arrived: next time it is sent everything that it may lack
            at.channel.holds(client, delivery)
            sent, self._kept[client], loss, self._moments[client] = self._turn(
                f, at.number, client, at.shared, self._kept.get(client, {}), self._moments.get(client)
            )
            at.channel.collect(at.number, client, sent)
            if self.spill is not None:
                sent = Spilled(self.spill / f"{client}.safetensors", sent)
            replies.append(Reply(Received(f.turn(at.number, client), len(f.shards[client].train), sent), loss))
        return replies

    def scores(self, f: Federation, at: Standing, number: int, evaluator: Evaluator | None):
        assert evaluator is not None, "all rows are here"
        return {
            client: f.scores(evaluator, number, client, at.shared, self._kept.get(client, {}))
            for client in range(f.clients.members)
        }

    def _turn(self, f: Federation, number: int, client: int, shared: Tree, kept: Tree, moments: State | None):
        began = time.perf_counter()
        turn = f.turn(number, client)
        assert f.data is not None, "clients train on rows"
        trainer = LocalTrainer(
            f.model, f.task, f.data.train, f.shards[client], f.spends(number, client), turn, f.rounds, moments,
            step_done=lambda: self.watch(Event("step", number, client)),
        )  # fmt: skip
        sent, stays = client_turn(f.rules, shared, kept, turn, trainer)
        self.clock["train"] += time.perf_counter() - began
        self.watch(Event("turn", number, client, trainer.loss))
        return sent, stays, trainer.loss, trainer.state
