"""The round loop that all engines have in common: cohort, turns, combination, measures, evaluation."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch

from fedlora.engines import privacy as private
from fedlora.engines.aggregation_error import errors
from fedlora.engines.base_updates import FoldLog, Folds
from fedlora.engines.clients import DROPPED
from fedlora.engines.comm.channel import Channel, Ledger
from fedlora.engines.federation import Federation
from fedlora.engines.record import Direction, RoundRecord
from fedlora.linalg.factors import compacted, total
from fedlora.registry import Registry
from fedlora.rounds import Received, Rules, Served, public
from fedlora.security.attacks._base import succeeded
from fedlora.security.robust._base import defended
from fedlora.security.validation import Bad, Gate, barred
from fedlora.seeds import derived
from fedlora.tasks.metrics.scores import Scores, figures
from fedlora.training.evaluation import Evaluator, summary
from fedlora.training.local import State
from fedlora.types import Tree, Turn


@dataclass(frozen=True)
class Event:
    """What a watcher is told, step by step."""

    kind: str  # "note" | "step" | "turn" | "evaluation" | "round" | "absent" | "waiting" | "quarantined"
    round: int
    client: int | None = None
    loss: float | None = None
    text: str = ""
    epsilon: float | None = None  # of a "round" with privacy: what has been spent so far


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
    conduct: dict[str, dict[str, Any]] = field(default_factory=dict)  # JSON-able; see hygiene/gate.py
    overheard: dict[int, Tree] = field(default_factory=dict)  # what an attack remembers of the last round


@dataclass(frozen=True)
class Round:
    """A finished round."""

    number: int  # from 0
    shared: Tree
    kept: Mapping[int, Tree]  # what each client holds for itself, where this machine knows it
    folds: FoldLog  # all of the run so far
    record: RoundRecord
    ledger: Ledger
    standing: Standing
    bad: Mapping[int, Bad] = field(default_factory=dict)  # uploads that were quarantined


Watch = Callable[[Event], None]
Observe = Callable[[Rules, Tree, list[Received]], Mapping[str, Any]]  # of a round's uploads: figures for its record


@dataclass
class Loop(ABC):
    """Runs a federation round by round; an engine says where the clients' turns run.

    An engine of another package is a dataclass that extends this class and defines ``turns`` and ``scores``, or extends
    ``InProcess`` and changes a part of it; ``[engine] name`` names it. Each upload must pass ``arrived``. Equal seeds
    must give equal bits in every engine, so the result of a turn may depend on its arguments only. It has no settings
    beside those of the ``[engine]`` table.
    """

    steps_here: ClassVar[bool] = True  # do clients train in this process, so that Ctrl-C can wait for a step's end?

    watch: Watch = lambda event: None
    observe: Observe | None = None
    clock: dict[str, float] = field(default_factory=dict, init=False)
    absent: dict[int, str] = field(default_factory=dict, init=False)  # of this round: client -> why
    unscored: dict[int, str] = field(default_factory=dict, init=False)  # the same of its evaluation
    gate: Gate = field(init=False)  # of this round

    @classmethod
    def drive(
        cls, config: Any, f: Federation, watch: Watch, observe: Observe | None, take: "Take"
    ) -> Mapping[int, Tree] | None:
        """Build the engine, and let ``take(engine, f)`` run all rounds with it.

        ``config`` is the run's ``Config``. Returns each client's own tree at the end, or None if the last round has it.
        """
        take(cls(watch, observe), f)
        return None

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

    def readings(self) -> Mapping[int, str]:
        """How each party reads the labels of its own data, as far as it has said; see ``labels.READINGS``."""
        return {}

    def undone(self, client: int) -> None:  # noqa: B027 - a party that is elsewhere sees to it itself
        """A client's turn of this round did not count: what it keeps is what it kept before."""

    def arrived(self, upload: Received) -> Received | None:
        """Every upload passes here: as the server has it, or None where it was quarantined."""
        found = self.gate.arrived(upload)
        if found is None:
            self._quarantined(upload.turn)
        return found

    def refused(self, upload: Received, reason: str) -> None:
        """Quarantines an upload that cannot even be read as one."""
        self.gate.refuse(upload, reason)
        self._quarantined(upload.turn)

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
        return f.evaluation.measure and not f.privacy.hides_figures

    def made(self, f: Federation, at: Standing, uploads: list[Received]) -> Served:
        """What the server makes of a round's uploads."""
        return private.made(f, at.number, at.shared, uploads)

    def begin(self, f: Federation) -> Standing:
        """Before the first round."""
        shared = f.model.initial(f.seed)
        return Standing(0, shared, FoldLog(), Channel(shared, f.heads, f.transport))

    def run(self, f: Federation, at: Standing | None = None) -> Iterator[Round]:
        """One ``Round`` after another, from the start or from where a run stands; stop whenever you like."""
        at = at or self.begin(f)
        evaluator = f.evaluator() if f.data is not None else None
        while at.number < f.rounds:
            number, began, before = at.number, time.perf_counter(), at.shared
            self.clock, self.absent, self.unscored = {"train": 0.0, "evaluate": 0.0}, {}, {}
            self.gate = Gate(f.hygiene, f.rules, before, at.conduct, alone=f.privacy.sums_clients)
            self._drop(f, at)
            replies = self._screened(f, at, self.turns(f, at))
            uploads, judged = defended(f.defence, f.method, f.rules, before, self.gathered(replies), number, f.seed)
            with self._timed("combine"):
                served = self._combined(f, at, uploads)
            at.counted |= {reply.upload.turn.client: number for reply in replies}
            losses = {reply.upload.turn.client: reply.loss for reply in replies}
            record = RoundRecord(round=number + 1)
            record["cohort"], record["loss"] = _named(f, losses)
            record |= cast(RoundRecord, private.spent(f, number + 1))
            if f.clients.stragglers:
                record["stragglers"] = [client for client in f.clients.slow(number, f.seed) if client in losses]
            with self._timed("measure"):
                if self.measured(f) and uploads:
                    record["weights"] = errors(f.rules, before, uploads, self.kept(), served)
                if self.observe is not None and not f.privacy.hides_figures:
                    record["oracle"] = self.observe(f.rules, before, uploads)
            if f.evaluation.due(number, f.rounds):
                record |= self._evaluated(f, evaluator, at, number)
            record |= {"absent": dict(self.absent)} if self.absent else {}
            record |= {"unscored": dict(self.unscored)} if self.unscored else {}
            bad = {} if f.privacy.hides_figures else self.gate.bad  # they show what single clients sent
            record |= {"quarantined": {k: one.reason for k, one in bad.items()}} if bad else {}
            record |= {"robust": judged} if judged else {}
            record["bytes"] = _bytes(at.channel.ledger, number)
            record["seconds"] = {**self.clock, "total": time.perf_counter() - began}
            self.watch(Event("round", number, epsilon=record["privacy"]["epsilon"] if "privacy" in record else None))
            folds = replace(at.folds, entries=list(at.folds.entries))  # as they are now
            yield Round(number, at.shared, dict(self.kept()), folds, record, at.channel.ledger, at, bad)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """What happens here counts as a phase of the round's seconds."""
        began = time.perf_counter()
        yield
        self.clock[phase] = time.perf_counter() - began

    def _drop(self, f: Federation, at: Standing) -> None:
        """Names who will not reply, drawn from the seed so that all engines and parties agree; and who may not."""
        for client in f.clients.dropped(at.number, f.seed):
            self.absent[client] = DROPPED
            self.watch(Event("absent", at.number, client))  # without words: it is as the configuration asks
        for client in sorted(barred(f.hygiene, at.conduct) & set(f.cohort(at.number))):
            self.absent[client] = f"left out: it was quarantined in {at.conduct['strikes'][str(client)]} rounds"

    def _screened(self, f: Federation, at: Standing, replies: list[Reply]) -> list[Reply]:
        """The replies whose uploads pass beside each other, in the server's form."""
        uploads = {reply.upload.turn.client: reply.upload for reply in replies}
        if f.attack is not None and (forged := f.attack.together(f.rules, at.shared, uploads, at.overheard)):
            uploads = {k: u for k, u in uploads.items() if k not in forged}
            uploads |= {k: found for k, u in forged.items() if (found := self.arrived(u)) is not None}
        before = set(self.gate.bad)
        good = {u.turn.client: u for u in self.gate.judged([uploads[k] for k in sorted(uploads)], f.work)}
        for client in sorted(self.gate.bad.keys() - before):
            self._quarantined(uploads[client].turn)
        self.gate.settle()
        if len(self.gate.bad) > 1 and not good and f.attack is None:  # one bad client alone must not end a run
            client, bad = min(self.gate.bad.items())
            raise FloatingPointError(
                f"every upload of round {at.number + 1} was quarantined (client {client}: {bad.reason}); lower "
                "training.learning_rate, or set training.max_grad_norm."
            )
        return [reply._replace(upload=good[k]) for reply in replies if (k := reply.upload.turn.client) in good]

    def _quarantined(self, turn: Turn) -> None:
        self.watch(
            Event("quarantined", turn.round, turn.client, text=f"quarantined: {self.gate.bad[turn.client].reason}")
        )
        self.undone(turn.client)

    def _combined(self, f: Federation, at: Standing, uploads: list[Received]) -> Served:
        served = f.server.stepped(at.shared, self.made(f, at, uploads))
        at.shared = f.transport.said(at.shared, served.shared, derived(f.seed, "down", at.number))
        if served.folds:
            # One update a weight, no larger than the weight: what everyone folds is what is sent, so the bits are one.
            folds = {part: (compacted(total(factors)),) for part, factors in served.folds.items()}
            at.folds.append(f.transport.rounded(folds))
            at.folds.settle(at.channel.held_by_all(f.clients.members))
            f.model.fold(at.folds.entries[-1])
        at.number += 1
        return served

    def _evaluated(self, f: Federation, evaluator: Evaluator | None, at: Standing, number: int) -> RoundRecord:
        began = time.perf_counter()
        found = RoundRecord()
        if not f.method.personal and evaluator is not None:
            tree = {part: public(layer) for part, layer in at.shared.items()}
            found["global"] = figures(evaluator.everyone(tree))
            judge = f.attack.judge(f.task) if f.attack is not None else None
            if judge is not None:
                hits, rows = f.evaluator(judge).everyone(tree).sums["success"]
                found["attack"] = {"success": hits / rows, "rows": rows}
        scores = self.scores(f, at, number, evaluator)
        if harm := succeeded(f.attack, scores):
            found["attack"] = harm
        if scores:
            found["clients"] = summary(scores, f.task.metric, f.clients.count, f.clients.capabilities(f.seed))
        self.clock["evaluate"] += time.perf_counter() - began
        self.watch(Event("evaluation", number))
        return found


Take = Callable[[Loop, Federation], None]  # runs all rounds of a federation with an engine
ENGINES = Registry(
    Loop,
    "engine",
    group="fedlora.engines",
    listed={
        "inprocess": "fedlora.engines.in_process:InProcess",
        "flower-simulation": "fedlora.flower.simulation:Simulation",
    },
)


def _named(f: Federation, losses: dict[int, float]) -> tuple[list[int], dict[int, float]]:
    """The clients that trained, and their losses; without what a guarantee of privacy does not cover."""
    if not f.privacy.hides_figures:
        return sorted(losses), losses
    return [] if f.clients.rate is not None else sorted(losses), {}


def _bytes(ledger: Ledger, number: int) -> dict[Direction, dict[str, int]]:
    """This round's bytes by direction and kind."""
    found: dict[Direction, dict[str, int]] = {"up": {}, "down": {}}
    for row in ledger.rows:
        if row.round == number:
            found[row.direction][row.kind] = found[row.direction].get(row.kind, 0) + row.bytes
    return found


def sound(rounds: Iterator[Round]) -> Iterator[Round]:
    """The rounds; ``FloatingPointError`` where a product of finite updates is too large to be decomposed."""
    try:
        yield from rounds
    except torch.linalg.LinAlgError as error:
        raise FloatingPointError(
            "what clients trained is too large to be combined or measured; lower training.learning_rate, or set "
            "training.max_grad_norm."
        ) from error
