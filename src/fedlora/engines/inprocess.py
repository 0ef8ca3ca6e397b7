"""The reference engine: all clients in one process, one after the other, on one base model."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.adapters import Dense
from fedlora.channel import Channel, Ledger
from fedlora.clients import Clients, Shard
from fedlora.evaluation import Evaluation, Evaluator, scores_of, summary
from fedlora.folds import FoldLog
from fedlora.measures import errors
from fedlora.method import Method
from fedlora.model import Model
from fedlora.optimizers import ServerOptimizer
from fedlora.rounds import Received, Rules, Served, client_turn, public, received, server_turn
from fedlora.seeds import derived
from fedlora.state import Spilled
from fedlora.tasks.task import Data, Task
from fedlora.training import LocalTrainer, State, Training
from fedlora.types import Tree, Turn


@dataclass(frozen=True)
class Federation:
    """All that a run needs, built; any engine runs it."""

    rules: Rules
    method: Method
    model: Model
    task: Task
    data: Data
    clients: Clients
    shards: list[Shard]
    budgets: list[int]
    training: Training
    evaluation: Evaluation
    server: ServerOptimizer
    rounds: int
    seed: int

    def turn(self, round: int, client: int) -> Turn:
        """A client's part in a round, its seed included."""
        return Turn(round, client, self.budgets[client], derived(self.seed, "turn", round, client))


@dataclass(frozen=True)
class Event:
    """What a watcher is told, step by step."""

    kind: str  # "step" | "turn" | "evaluation" | "round"
    round: int
    client: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Round:
    """A finished round."""

    number: int  # from 0
    shared: Tree
    kept: Mapping[int, Tree]  # what each client holds for itself
    folds: FoldLog  # all of the run so far
    record: Mapping[str, Any]  # JSON-able: losses, scores, errors, bytes, seconds
    ledger: Ledger


Watch = Callable[[Event], None]
Observe = Callable[[Rules, Tree, list[Received]], Mapping[str, Any]]  # of a round's uploads: figures for its record


@dataclass
class InProcess:
    """Runs a federation round by round."""

    watch: Watch = lambda event: None
    observe: Observe | None = None
    spill: Path | None = None  # a folder for a round's uploads, instead of memory
    _clock: dict[str, float] = field(default_factory=dict)

    def run(self, federation: Federation) -> Iterator[Round]:
        """One ``Round`` after another; stop whenever you like."""
        f = federation
        shared = f.model.initial(f.seed)
        heads = frozenset(part for part, rule in f.rules.items() if isinstance(rule.adapter, Dense))
        channel = Channel(shared, heads)
        evaluator = Evaluator(f.model, f.task, f.data.test, f.shards, f.evaluation.batch_size)
        kept: dict[int, Tree] = {}
        moments: dict[int, State | None] = {}
        log = FoldLog()
        for number in range(f.rounds):
            self._clock = {"train": 0.0, "evaluate": 0.0}
            began = time.perf_counter()
            cohort = f.clients.cohort(number, f.seed)
            uploads, losses = [], {}
            for client in cohort:
                own = received(f.rules, shared, kept.get(client, {}), f.turn(number, client))
                channel.deliver(number, client, shared, log, own)
                sent, kept[client], losses[client], moments[client] = self._turn(
                    f, number, client, shared, kept.get(client, {}), moments.get(client)
                )
                channel.collect(number, client, sent)
                if self.spill is not None:
                    sent = Spilled(self.spill / f"{client}.safetensors", sent)
                uploads.append(Received(f.turn(number, client), len(f.shards[client].train), sent))
            before, served = shared, f.server.stepped(shared, server_turn(f.rules, shared, uploads))
            shared = served.shared
            if served.folds:
                log.append(served.folds)
                log.settle(channel.held_by_all(f.clients.count))
                f.model.fold(served.folds)
            record: dict[str, Any] = {"round": number + 1, "cohort": cohort, "loss": losses}
            if f.evaluation.measure:
                record["weights"] = errors(f.rules, before, uploads, kept, served)
            if self.observe is not None:
                record["oracle"] = self.observe(f.rules, before, uploads)
            if f.evaluation.due(number, f.rounds):
                record |= self._evaluate(f, evaluator, shared, kept, number)
            record["bytes"] = _bytes(channel.ledger, number)
            record["seconds"] = {**self._clock, "total": time.perf_counter() - began}
            self.watch(Event("round", number))
            yield Round(number, shared, dict(kept), log, record, channel.ledger)

    def _turn(self, f: Federation, number: int, client: int, shared: Tree, kept: Tree, moments: State | None):
        began = time.perf_counter()
        turn = f.turn(number, client)
        trainer = LocalTrainer(
            f.model, f.task, f.data.train, f.shards[client], f.training, turn, f.rounds, moments,
            step_done=lambda: self.watch(Event("step", number, client)),
        )  # fmt: skip
        sent, stays = client_turn(f.rules, shared, kept, turn, trainer)
        self._clock["train"] += time.perf_counter() - began
        self.watch(Event("turn", number, client, trainer.loss))
        return sent, stays, trainer.loss, trainer.state

    def _evaluate(self, f: Federation, evaluator: Evaluator, shared: Tree, kept: Mapping[int, Tree], number: int):
        began = time.perf_counter()
        found: dict[str, Any] = {}
        if not f.method.personal:
            found["global"] = scores_of(evaluator.everyone({part: public(layer) for part, layer in shared.items()}))
        scores = []
        for client in range(f.clients.count):
            tree = received(f.rules, shared, kept.get(client, {}), f.turn(number + 1, client))
            scores.append(evaluator.client(client, tree))
        found["clients"] = {**summary(scores), "each": [scores_of(s)["accuracy"] for s in scores]}
        self._clock["evaluate"] += time.perf_counter() - began
        self.watch(Event("evaluation", number))
        return found


def _bytes(ledger: Ledger, number: int) -> dict[str, dict[str, int]]:
    """This round's bytes by direction and kind."""
    found: dict[str, dict[str, int]] = {"up": {}, "down": {}}
    for row in ledger.rows:
        if row.round == number:
            found[row.direction][row.kind] = found[row.direction].get(row.kind, 0) + row.bytes
    return found


__all__ = ["Event", "Federation", "InProcess", "Round", "Served"]
