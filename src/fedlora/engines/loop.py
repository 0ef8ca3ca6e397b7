"""The round loop that all engines have in common: cohort, turns, combination, measures, evaluation."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fedlora.adapters import Dense
from fedlora.channel import Channel, Ledger
from fedlora.clients import DROPPED, Clients, Shard
from fedlora.evaluation import Evaluation, Evaluator, summary
from fedlora.folds import FoldLog, Folds
from fedlora.linalg import compacted, total
from fedlora.measures import errors
from fedlora.method import Method
from fedlora.metrics import Scores, figures
from fedlora.model import Model
from fedlora.optimizers import ServerOptimizer
from fedlora.rounds import Received, Rules, Served, public, received, server_turn
from fedlora.seeds import derived
from fedlora.tasks.task import Data, Task
from fedlora.training import State, Training
from fedlora.types import Tree, Turn


@dataclass(frozen=True)
class Federation:
    """All that a run needs, built; any engine runs it. On a party's own machine ``shards`` has only its own rows."""

    rules: Rules
    method: Method
    model: Model
    task: Task
    data: Data | None  # None: this machine only combines
    clients: Clients
    shards: Mapping[int, Shard] | Sequence[Shard]
    budgets: list[int]
    training: Training
    evaluation: Evaluation
    server: ServerOptimizer
    rounds: int
    seed: int
    label_names: tuple[str, ...] = ()
    fingerprint: str = ""  # of the configuration, without what is a party's own

    def turn(self, round: int, client: int) -> Turn:
        """A client's part in a round, its seed included."""
        return Turn(round, client, self.budgets[client], derived(self.seed, "turn", round, client))

    def spends(self, round: int, client: int) -> Training:
        """``[training]`` as a client has it in a round: with its own number of steps where clients differ in that."""
        usual = self.training.steps(len(self.shards[client].train))
        steps = self.clients.steps(usual, round, client, self.seed)
        return self.training if steps == usual else replace(self.training, local_steps=steps, local_epochs=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told of how this machine's rows were read."""
        return () if self.data is None else self.data.notes

    @property
    def heads(self) -> frozenset[str]:
        """The parts trained in full."""
        return frozenset(part for part, rule in self.rules.items() if isinstance(rule.adapter, Dense))

    def evaluator(self) -> Evaluator:
        """Scores trees on the test rows of this machine."""
        assert self.data is not None, "only a machine with data evaluates"
        return Evaluator(self.model, self.task, self.data.test, self.shards, self.evaluation.batch_size)

    def scores(self, evaluator: Evaluator, number: int, client: int, shared: Tree, kept: Tree) -> Scores:
        """What a client holds after round ``number``, on its own test rows."""
        return evaluator.client(client, received(self.rules, shared, kept, self.turn(number + 1, client)))


@dataclass(frozen=True)
class Event:
    """What a watcher is told, step by step."""

    kind: str  # "note" | "step" | "turn" | "evaluation" | "round" | "absent" | "waiting"
    round: int
    client: int | None = None
    loss: float | None = None
    text: str = ""


class Reply(NamedTuple):
    """What a client's turn came to, as the server sees it."""

    upload: Received
    loss: float


class Private(NamedTuple):
    """What a client keeps for itself from turn to turn."""

    kept: Tree
    moments: State | None = None  # its optimiser's, where these are kept


@dataclass
class Standing:
    """Where a run stands between two rounds: with the parties' own state, all that its next round depends on."""

    number: int  # of the next round, from 0
    shared: Tree
    folds: FoldLog
    channel: Channel
    counted: dict[int, int] = field(default_factory=dict)  # client -> the last round that its upload went into


@dataclass(frozen=True)
class Round:
    """A finished round."""

    number: int  # from 0
    shared: Tree
    kept: Mapping[int, Tree]  # what each client holds for itself, where this machine knows it
    folds: FoldLog  # all of the run so far
    record: Mapping[str, Any]  # JSON-able: losses, scores, errors, bytes, seconds
    ledger: Ledger
    standing: Standing


Watch = Callable[[Event], None]
Observe = Callable[[Rules, Tree, list[Received]], Mapping[str, Any]]  # of a round's uploads: figures for its record


@dataclass
class Loop(ABC):
    """Runs a federation round by round; an engine says where the clients' turns run."""

    watch: Watch = lambda event: None
    observe: Observe | None = None
    clock: dict[str, float] = field(default_factory=dict, init=False)
    absent: dict[int, str] = field(default_factory=dict, init=False)  # of this round: client -> why
    unscored: dict[int, str] = field(default_factory=dict, init=False)  # the same of its evaluation

    @abstractmethod
    def turns(self, f: Federation, at: Standing) -> list[Reply]:
        """The turns of a round's cohort."""

    @abstractmethod
    def scores(self, f: Federation, at: Standing, number: int, evaluator: Evaluator | None) -> Mapping[int, Scores]:
        """Every client's scores with what it holds after round ``number``, on its own test rows.

        ``evaluator`` is the server's own, on a machine that has the data.
        """

    def gathered(self, replies: list[Reply]) -> list[Received]:
        """What the method combines of a round's replies."""
        return [reply.upload for reply in replies]

    def kept(self) -> Mapping[int, Tree]:
        """What clients hold for themselves, where it is on this machine."""
        return {}

    def privates(self, at: Standing) -> Mapping[int, Private] | None:
        """What each client keeps for itself between two rounds; None: that is not on this machine."""
        return None

    def refolded(self, folds: Folds) -> None:
        """Told of each fold, in order, that is in the base again where a run goes on."""
        return None

    def resumed(self, f: Federation, at: Standing, privates: Mapping[int, Private] | None) -> None:
        """A run goes on from ``at``, with what its clients kept, where that is on this machine."""
        return None

    def measured(self, f: Federation) -> bool:
        """Whether the aggregation's errors are to be taken: they need what the clients trained, all of it."""
        return f.evaluation.measure

    def begin(self, f: Federation) -> Standing:
        """Before the first round."""
        shared = f.model.initial(f.seed)
        return Standing(0, shared, FoldLog(), Channel(shared, f.heads))

    def run(self, f: Federation, at: Standing | None = None) -> Iterator[Round]:
        """One ``Round`` after another, from the start or from where a run stands; stop whenever you like."""
        at = at or self.begin(f)
        evaluator = f.evaluator() if f.data is not None else None
        while at.number < f.rounds:
            number, began, before = at.number, time.perf_counter(), at.shared
            self.clock, self.absent, self.unscored = {"train": 0.0, "evaluate": 0.0}, {}, {}
            self._drop(f, number)
            replies = self.turns(f, at)
            uploads = self.gathered(replies)
            served = self._combined(f, at, uploads)
            at.counted |= {reply.upload.turn.client: number for reply in replies}
            losses = {reply.upload.turn.client: reply.loss for reply in replies}
            record: dict[str, Any] = {"round": number + 1, "cohort": sorted(losses), "loss": losses}
            if f.clients.stragglers:
                record["stragglers"] = [client for client in f.clients.slow(number, f.seed) if client in losses]
            if self.measured(f) and uploads:
                record["weights"] = errors(f.rules, before, uploads, self.kept(), served)
            if self.observe is not None:
                record["oracle"] = self.observe(f.rules, before, uploads)
            if f.evaluation.due(number, f.rounds):
                record |= self._evaluated(f, evaluator, at, number)
            record |= {key: dict(found) for key in ("absent", "unscored") if (found := getattr(self, key))}
            record["bytes"] = _bytes(at.channel.ledger, number)
            record["seconds"] = {**self.clock, "total": time.perf_counter() - began}
            self.watch(Event("round", number))
            folds = replace(at.folds, entries=list(at.folds.entries))  # as they are now
            yield Round(number, at.shared, dict(self.kept()), folds, record, at.channel.ledger, at)

    def _drop(self, f: Federation, number: int) -> None:
        """Names who will not reply: drawn from the seed, so that every engine and every party agrees."""
        for client in f.clients.dropped(number, f.seed):
            self.absent[client] = DROPPED
            self.watch(Event("absent", number, client))  # without words: it is as the configuration asks

    def _combined(self, f: Federation, at: Standing, uploads: list[Received]) -> Served:
        served = f.server.stepped(at.shared, server_turn(f.rules, at.shared, uploads))
        at.shared = served.shared
        if served.folds:
            # One update a weight, no larger than the weight: what everyone folds is what is sent, so the bits are one.
            at.folds.append({part: (compacted(total(factors)),) for part, factors in served.folds.items()})
            at.folds.settle(at.channel.held_by_all(f.clients.members))
            f.model.fold(at.folds.entries[-1])
        at.number += 1
        return served

    def _evaluated(self, f: Federation, evaluator: Evaluator | None, at: Standing, number: int) -> dict[str, Any]:
        began = time.perf_counter()
        found: dict[str, Any] = {}
        if not f.method.personal and evaluator is not None:
            tree = {part: public(layer) for part, layer in at.shared.items()}
            found["global"] = figures(evaluator.everyone(tree))
        scores = self.scores(f, at, number, evaluator)
        if scores:
            found["clients"] = summary(scores, f.task.metric, f.clients.count, f.clients.capabilities(f.seed))
        self.clock["evaluate"] += time.perf_counter() - began
        self.watch(Event("evaluation", number))
        return found


def _bytes(ledger: Ledger, number: int) -> dict[str, dict[str, int]]:
    """This round's bytes by direction and kind."""
    found: dict[str, dict[str, int]] = {"up": {}, "down": {}}
    for row in ledger.rows:
        if row.round == number:
            found[row.direction][row.kind] = found[row.direction].get(row.kind, 0) + row.bytes
    return found
