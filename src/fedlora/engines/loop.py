"""The round loop of all engines: cohort, turns, aggregation, measurement, evaluation."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch

from fedlora.engines.aggregation_error import aggregation_errors
from fedlora.engines.base_updates import BaseUpdate, BaseUpdateLog
from fedlora.engines.client_turn import ClientState
from fedlora.engines.clients import DROPPED
from fedlora.engines.comm.channel import Channel, Transfer
from fedlora.engines.federation import Federation
from fedlora.engines.record import Direction, RoundRecord
from fedlora.linalg.factors import compact, total
from fedlora.registry import Registry
from fedlora.rounds import Received, Rules, Served, public_leaves, server_turn
from fedlora.security.attacks._base import success_rate
from fedlora.security.privacy import Stream
from fedlora.security.privacy.client_level import private_turn
from fedlora.security.robust._base import reweigh_uploads
from fedlora.security.validation import Rejected, UploadScreen, excluded_clients
from fedlora.seeds import derive_seed
from fedlora.tasks.metrics.scores import Scores, compute_metrics
from fedlora.training.evaluation import Scorer, summarize
from fedlora.training.ranks import synchronize
from fedlora.types import Tree, Turn


@dataclass(frozen=True)
class Event:
    """A step of a run, for watchers."""

    kind: str  # "note" | "step" | "turn" | "evaluation" | "round" | "absent" | "waiting" | "quarantined"
    round: int
    client: int | None = None
    loss: float | None = None
    text: str = ""
    epsilon: float | None = None  # of a "round" with privacy: spent so far


class Reply(NamedTuple):
    """The result of a client's turn, as the server has it."""

    upload: Received
    loss: float | None  # None: not known


@dataclass
class ServerState:
    """The server's state between two rounds. The next round depends on it and on the clients' states only."""

    number: int  # of the next round, from 0
    shared: Tree
    base_updates: BaseUpdateLog
    channel: Channel
    counted: dict[int, int] = field(default_factory=dict)  # client -> the last round with its upload in the aggregate
    conduct: dict[str, dict[str, Any]] = field(default_factory=dict)  # JSON-able; see security/validation/screen.py
    overheard: dict[int, Tree] = field(default_factory=dict)  # an attack's memory of the last round


@dataclass(frozen=True)
class Round:
    """A finished round."""

    number: int  # from 0
    shared: Tree
    kept: Mapping[int, Tree]  # each client's own tree, if this machine has it
    base_updates: BaseUpdateLog  # all of the run so far
    record: RoundRecord
    ledger: list[Transfer]
    state: ServerState
    bad: Mapping[int, Rejected] = field(default_factory=dict)  # uploads that were quarantined


Watch = Callable[[Event], None]
Observe = Callable[[Rules, Tree, list[Received]], Mapping[str, Any]]  # uploads of a round -> figures for its record


@dataclass
class Loop(ABC):
    """Runs a federation round by round; an engine defines where the clients' turns run.

    An engine of another package is a dataclass that extends this class and defines ``run_turns`` and ``score_clients``,
    or extends ``InProcess`` and changes a part of it; ``[engine] name`` names it. Each upload must pass
    ``receive_upload``. Equal seeds must give equal bits in every engine, so the result of a turn may depend on its
    arguments only. It has no settings beside those of the ``[engine]`` table.
    """

    steps_here: ClassVar[bool] = True  # whether clients train in this process: then Ctrl-C waits for the end of a step

    watch: Watch = lambda event: None
    observe: Observe | None = None
    clock: dict[str, float] = field(default_factory=dict, init=False)
    absent: dict[int, str] = field(default_factory=dict, init=False)  # of this round: client -> reason
    unscored: dict[int, str] = field(default_factory=dict, init=False)  # the same of its evaluation
    screen: UploadScreen = field(init=False)  # of this round
    began: float = field(default=0.0, init=False)  # when this round began

    @classmethod
    def drive(
        cls, config: Any, f: Federation, watch: Watch, observe: Observe | None, take: "Take"
    ) -> Mapping[int, Tree] | None:
        """Build the engine, and call ``take(engine, f)``, which runs all rounds with it.

        ``config`` is the run's ``Config``. Returns each client's own tree at the end, or None if the last round has it.
        """
        take(cls(watch, observe), f)
        return None

    @abstractmethod
    def run_turns(self, f: Federation, at: ServerState) -> list[Reply]:
        """Run the turns of a round's cohort and return the replies."""

    @abstractmethod
    def score_clients(
        self, f: Federation, at: ServerState, number: int, evaluator: Scorer | None
    ) -> Mapping[int, Scores]:
        """Score each client's model after round ``number`` on the client's own test rows.

        ``evaluator`` is the server's own, on a machine that has the data.
        """

    def select_uploads(self, replies: list[Reply]) -> list[Received]:
        """Return the uploads that the method aggregates."""
        return [reply.upload for reply in replies]

    def kept_trees(self) -> Mapping[int, Tree]:
        """Return the clients' own trees, if they are on this machine."""
        return {}

    def readings(self) -> Mapping[int, str]:
        """Return each client's reading of its own labels, if it has reported one; see ``labels.READINGS``."""
        return {}

    def undo_turn(self, client: int) -> None:  # noqa: B027 - a client on another machine does this itself
        """Set a client back to its state before this round, because its turn does not count."""

    def receive_upload(self, upload: Received) -> Received | None:
        """Screen an upload alone. Returns it in the server's form, or None if it is quarantined."""
        checked = self.screen.check(upload)
        if checked is None:
            self._report_quarantine(upload.turn)
        return checked

    def refuse_upload(self, upload: Received, reason: str) -> None:
        """Quarantine an upload that cannot be decoded."""
        self.screen.refuse(upload, reason)
        self._report_quarantine(upload.turn)

    def client_states(self, at: ServerState) -> Mapping[int, ClientState] | None:
        """Return each client's own state between two rounds; None if that is not on this machine."""
        return None

    def on_base_update(self, base_updates: BaseUpdate) -> None:  # noqa: B027 - most engines have nothing to do
        """Called for each base update that is re-applied on resume, in order."""

    def restore(self, f: Federation, at: ServerState, states: Mapping[int, ClientState] | None) -> None:
        """Restore the clients' states on resume; ``states`` is None if they are not on this machine."""
        return None

    def is_measured(self, f: Federation) -> bool:
        """Whether aggregation errors are computed. They need every client's whole upload."""
        return f.evaluation.measure and not f.privacy.hides_figures

    def aggregate(self, f: Federation, at: ServerState, uploads: list[Received]) -> Served:
        """Aggregate the uploads of a round: the method's server turn, or the noised sum of client-level privacy."""
        p = f.privacy
        if not p.sums_clients:
            return server_turn(f.rules, at.shared, uploads)
        std, turn = f.privacy_ledger.noise_multiplier * p.clip, f.turn(at.number, 0)
        return private_turn(f.rules, at.shared, turn, uploads, p.clip, std, f.clients.mean_cohort_size, Stream(f.key))

    def begin(self, f: Federation) -> ServerState:
        """Return the state before the first round."""
        shared = f.model.initial(f.seed)
        return ServerState(0, shared, BaseUpdateLog(), Channel(shared, f.heads, f.compression))

    def run(self, f: Federation, at: ServerState | None = None) -> Iterator[Round]:
        """Yield one ``Round`` after another, from the start or from ``at``; the caller may stop at any round."""
        at = at or self.begin(f)
        evaluator = f.evaluator()
        while at.number < f.rounds:
            self.open_round(f, at)
            yield self.close_round(f, at, self.run_turns(f, at), evaluator)

    def open_round(self, f: Federation, at: ServerState) -> None:
        """Begin a round: its clock, its screening of uploads, and the clients that are away."""
        self.clock, self.absent, self.unscored = {"train": 0.0, "evaluate": 0.0}, {}, {}
        self.began = time.perf_counter()
        self.screen = UploadScreen(f.validation, f.rules, at.shared, at.conduct, alone=f.privacy.sums_clients)
        self._drop(f, at)

    def close_round(self, f: Federation, at: ServerState, replies: list[Reply], evaluator: Scorer | None) -> Round:
        """Combine the replies of a round, measure and evaluate it, and return it."""
        number, before = at.number, at.shared
        replies = self._screen(f, at, replies)
        selected = self.select_uploads(replies)
        uploads, judged = reweigh_uploads(f.robust, f.method, f.rules, before, selected, number, f.seed)
        with self._time_phase("combine"):
            served = self._combine(f, at, uploads)
        at.counted |= {reply.upload.turn.client: number for reply in replies}
        losses = {reply.upload.turn.client: reply.loss for reply in replies}
        record = RoundRecord(round=number + 1)
        hidden = f.privacy.hides_figures
        record["cohort"] = [] if hidden and f.clients.rate is not None else sorted(losses)
        record["loss"] = {} if hidden else losses
        record |= cast(RoundRecord, f.privacy_ledger.report_spending(number + 1))
        if f.clients.stragglers:
            record["stragglers"] = [client for client in f.clients.draw_stragglers(number, f.seed) if client in losses]
        with self._time_phase("measure"):
            if self.is_measured(f) and uploads:
                record["weights"] = aggregation_errors(f.rules, before, uploads, self.kept_trees(), served)
            if self.observe is not None and not hidden:
                record["oracle"] = self.observe(f.rules, before, uploads)
        if f.evaluation.is_due(number, f.rounds):
            record |= self._evaluate(f, evaluator, at, number)
        bad = {} if hidden else self.screen.rejected  # they show uploads of single clients
        quarantined = {client: rejected.reason for client, rejected in bad.items()}
        faults = {"absent": dict(self.absent), "unscored": dict(self.unscored), "quarantined": quarantined}
        record |= cast(RoundRecord, {key: value for key, value in {**faults, "robust": judged}.items() if value})
        record["bytes"] = _sum_bytes(at.channel.ledger, number)
        record["seconds"] = {**self.clock, "total": time.perf_counter() - self.began}
        self.watch(Event("round", number, epsilon=record["privacy"]["epsilon"] if "privacy" in record else None))
        base_updates = replace(at.base_updates, entries=list(at.base_updates.entries))  # as they are now
        return Round(number, at.shared, dict(self.kept_trees()), base_updates, record, at.channel.ledger, at, bad)

    @contextmanager
    def _time_phase(self, phase: str) -> Iterator[None]:
        """Set a phase's time in the round's seconds to that of the block."""
        began = time.perf_counter()
        yield
        self.clock[phase] = time.perf_counter() - began

    def _drop(self, f: Federation, at: ServerState) -> None:
        """Note the dropouts, which the seed determines on every machine, and the clients excluded by quarantine."""
        for client in f.clients.draw_dropouts(at.number, f.seed):
            self.absent[client] = DROPPED
            self.watch(Event("absent", at.number, client))  # no text: the configuration sets it
        for client in sorted(excluded_clients(f.validation, at.conduct) & set(f.cohort(at.number))):
            self.absent[client] = f"left out: it was quarantined in {at.conduct['strikes'][str(client)]} rounds"

    def _screen(self, f: Federation, at: ServerState, replies: list[Reply]) -> list[Reply]:
        """Return the replies whose uploads pass the comparison with each other, in the server's form."""
        uploads = {reply.upload.turn.client: reply.upload for reply in replies}
        if f.attack is not None and (forged := f.attack.alter_together(f.rules, at.shared, uploads, at.overheard)):
            uploads = {k: u for k, u in uploads.items() if k not in forged}
            uploads |= {k: checked for k, u in forged.items() if (checked := self.receive_upload(u)) is not None}
        before = set(self.screen.rejected)
        good = {u.turn.client: u for u in self.screen.compare([uploads[k] for k in sorted(uploads)], f.planned_steps)}
        for client in sorted(self.screen.rejected.keys() - before):
            self._report_quarantine(uploads[client].turn)
        self.screen.record_conduct()
        if len(self.screen.rejected) > 1 and not good and f.attack is None:  # one bad client alone must not end a run
            client, bad = min(self.screen.rejected.items())
            raise FloatingPointError(
                f"every upload of round {at.number + 1} was quarantined (client {client}: {bad.reason}); lower "
                "training.learning_rate, or set training.max_grad_norm."
            )
        return [reply._replace(upload=good[k]) for reply in replies if (k := reply.upload.turn.client) in good]

    def _report_quarantine(self, turn: Turn) -> None:
        text = f"quarantined: {self.screen.rejected[turn.client].reason}"
        self.watch(Event("quarantined", turn.round, turn.client, text=text))
        self.undo_turn(turn.client)

    def _combine(self, f: Federation, at: ServerState, uploads: list[Received]) -> Served:
        served = f.server.step(at.shared, self.aggregate(f, at, uploads))
        before = at.shared
        synchronize(
            {part: {k: x for k, x in y.items() if x is not before[part].get(k)} for part, y in served.shared.items()}
        )
        at.shared = f.compression.encode_shared(at.shared, served.shared, derive_seed(f.seed, "down", at.number))
        if served.base_updates:
            # One update a weight, no larger than the weight. All apply the rounded update, so bits are equal.
            base_updates = {part: (compact(total(factors)),) for part, factors in served.base_updates.items()}
            synchronize({part: factors[0]._asdict() for part, factors in base_updates.items()})
            at.base_updates.append(f.compression.round_base_update(base_updates))
            at.base_updates.settle(min(map(at.channel.count_base_updates, range(f.clients.members))))
            f.model.fold(at.base_updates.entries[-1])
        at.number += 1
        return served

    def _evaluate(self, f: Federation, evaluator: Scorer | None, at: ServerState, number: int) -> RoundRecord:
        began = time.perf_counter()
        record = RoundRecord()
        if not f.method.personal and evaluator is not None:
            tree = {part: public_leaves(layer) for part, layer in at.shared.items()}
            record["global"] = compute_metrics(evaluator.score_all(tree))
            judge = f.attack.success_task(f.task) if f.attack is not None else None
            if judge is not None:
                judging = f.evaluator(judge)
                assert judging is not None
                hits, rows = judging.score_all(tree).sums["success"]
                record["attack"] = {"success": hits / rows, "rows": rows}
        scores = self.score_clients(f, at, number, evaluator)
        if harm := success_rate(f.attack, scores):
            record["attack"] = harm
        if scores:
            record["clients"] = summarize(
                scores, f.task.metric, f.clients.count, f.clients.capabilities(f.seed), f.task.is_higher_better
            )
        self.clock["evaluate"] += time.perf_counter() - began
        self.watch(Event("evaluation", number))
        return record


Take = Callable[[Loop, Federation], None]  # runs all rounds of a federation with an engine
_PATHS = {
    "inprocess": "fedlora.engines.in_process:InProcess",
    "flower-simulation": "fedlora.flower.simulation:Simulation",
}
ENGINES = Registry(Loop, "engine", group="fedlora.engines", listed=_PATHS)


def _sum_bytes(ledger: list[Transfer], number: int) -> dict[Direction, dict[str, int]]:
    """Sum the bytes of a round by direction and kind."""
    sums: dict[Direction, dict[str, int]] = {"up": {}, "down": {}}
    for row in ledger:
        if row.round == number:
            sums[row.direction][row.kind] = sums[row.direction].get(row.kind, 0) + row.bytes
    return sums


@contextmanager
def explain_overflow() -> Iterator[None]:
    """Raise ``FloatingPointError`` if a product of finite updates in the block is too large to decompose."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise FloatingPointError(
            "the uploads are too large to be combined or measured; lower training.learning_rate, or set "
            "training.max_grad_norm."
        ) from error
