"""The federation: the parts of a run, built and checked, for any engine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedlora.adapters import Dense
from fedlora.engines.clients import Clients
from fedlora.engines.comm.compression import Compression
from fedlora.engines.privacy_ledger import PrivacyLedger
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.engines.trainers import Trainers
from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, client_start
from fedlora.security.attacks._base import Attack
from fedlora.security.privacy import Privacy, Stream, key_of
from fedlora.security.robust._base import RobustAggregator
from fedlora.security.validation import Validation
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Data, Shard, Task
from fedlora.tasks.data.labels import label_map
from fedlora.tasks.metrics.scores import Scores
from fedlora.training.evaluation import Evaluation, Evaluator, Scorer
from fedlora.training.local import Training
from fedlora.training.model import Model
from fedlora.types import Tree, Turn


@dataclass(frozen=True)
class Federation:
    """All parts of a run. On a client's own machine, ``shards`` has only its own rows."""

    rules: Rules
    method: Method
    model: Model
    task: Task
    data: Data | None  # None: this machine only aggregates, or clients train with ``trainers``
    clients: Clients
    shards: Mapping[int, Shard] | Sequence[Shard]
    budgets: list[int]
    training: Training
    evaluation: Evaluation
    server: ServerOptimizer
    rounds: int
    seed: int
    label_names: tuple[str, ...] = ()
    fingerprint: str = ""  # of the configuration, without the settings of one machine
    validation: Validation = field(default_factory=Validation)
    robust: RobustAggregator | None = None
    attack: Attack | None = None
    compression: Compression = field(default_factory=Compression)
    privacy: Privacy = field(default_factory=Privacy)
    trainers: Trainers | None = None  # the callers' own, in place of the task and its rows
    # In a rehearsal: each party's own federation, with its own task and rows, on the same model. ``data`` is None.
    parties: Mapping[int, "Federation"] = field(default_factory=dict, repr=False)
    model_notes: tuple[str, ...] = ()  # messages for the user about how the model was loaded
    _cohorts: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)  # round -> its clients

    @cached_property
    def key(self) -> bytes:
        """The key of this machine's draws for privacy."""
        return key_of(None if self.privacy.secret else self.seed)

    @cached_property
    def privacy_ledger(self) -> PrivacyLedger:
        """The privacy that the run spends, with the noise multiplier that follows from it."""
        clients = self.shards if isinstance(self.shards, Mapping) else range(len(self.shards))
        # A whole client's privacy does not depend on its rows, whose number may need its trainer.
        rows = {client: len(self.shards[client].train) if self.privacy.by_example else 1 for client in clients}
        return PrivacyLedger(
            self.privacy, self.clients, self.training, self.rounds, rows, self.cohort,
            lambda round, client: self.training_of(round, client).steps(rows[client]),
        )  # fmt: skip

    def report_privacy(self, rounds: int) -> dict[str, Any]:
        """Return the guarantee after some rounds; where each party alone knows its rows, of the one with the least."""
        if not (self.parties and self.privacy.by_example):
            return self.privacy_ledger.report(rounds)
        ledgers = [replace(own.privacy_ledger, cohort=self.cohort) for own in self.parties.values()]
        reports = [ledger.report(rounds)["privacy"] for ledger in ledgers]
        least = max(reports, key=lambda report: math.inf if report["epsilon"] is None else report["epsilon"])
        return {"privacy": {**least, "clients": {k: x for report in reports for k, x in report["clients"].items()}}}

    def cohort(self, round: int) -> list[int]:
        """Return the clients of a round, in order."""
        if round not in self._cohorts:
            self._cohorts[round] = self.clients.cohort(round, self.cohort_seed)
        return self._cohorts[round]

    def order(self, round: int) -> list[int]:
        """Return the cohort, then the substitutes for absent clients; with privacy, there are none."""
        return self.cohort(round) if self.privacy.on else self.clients.order(round, self.seed)

    @property
    def cohort_seed(self) -> int:
        """The seed of the cohorts: the run's, or a secret of this machine if the sample must stay secret."""
        return Stream(self.key).seed if self.privacy.secret and self.clients.rate is not None else self.seed

    def turn(self, round: int, client: int) -> Turn:
        """Return a client's turn in a round: numbers, rank and seed."""
        return Turn(round, client, self.budgets[client], derive_seed(self.seed, "turn", round, client))

    def training_of(self, round: int, client: int) -> Training:
        """Return ``[training]`` of a client in a round, with its own number of steps if clients differ in it."""
        usual = self.training.steps(len(self.shards[client].train))
        steps = self.clients.steps(usual, round, client, self.seed)
        return self.training if steps == usual else replace(self.training, local_steps=steps, local_epochs=None)

    def planned_steps(self, upload: Received) -> int:
        """Return the optimizer steps of an upload that follow from the rows that its client claims."""
        turn = upload.turn
        return self.clients.steps(self.training.steps(upload.examples), turn.round, turn.client, self.seed)

    def for_client(self, client: int) -> "Federation":
        """Return the federation with a client's task and rows: its own in a rehearsal of parties, else this one."""
        return self.parties.get(client, self)

    @property
    def notes(self) -> tuple[str, ...]:
        """Note for the user: on the method's settings, and on the labels and partition of this machine's rows."""
        caution = (*(() if self.method.caution is None else (self.method.caution,)), *self.model_notes)
        if self.trainers is not None and self.trainers.evaluator() is None:
            return (*caution, "no trainer has an eval_dataset, and there is no evaluate function: nothing is scored.")
        if self.data is None:
            return (*caution, *(note for own in self.parties.values() if own.data for note in own.data.notes))
        unused = self.clients.partitioner.describe_unused_rows(self.data.train, self.data.test, self.clients.count)
        return (*caution, *self.data.notes, *([unused] if unused else []))

    def label_map(self, reading: str) -> dict[str, str]:
        """Map the values of a label column to classes, by a reading (one of ``labels.READINGS``)."""
        return label_map(self.task.all_labels() or self.label_names, self.label_names, reading)

    @property
    def heads(self) -> frozenset[str]:
        """The parts trained in full."""
        return frozenset(part for part, rule in self.rules.items() if isinstance(rule.adapter, Dense))

    def evaluator(self, task: Task | None = None) -> Scorer | None:
        """Return an evaluator on this machine's test rows, for the run's task or another one on the same rows.

        None on a machine without test rows.
        """
        if self.trainers is not None:
            return self.trainers.evaluator()
        if self.data is None:
            return None
        return Evaluator(self.model, task or self.task, self.data.test, self.shards, self.evaluation)

    def score_client(self, evaluator: Scorer, number: int, client: int, shared: Tree, kept: Tree) -> Scores:
        """Score a client's model after round ``number`` on its own test rows.

        With a personal method, the scores include the success of an attack.
        """
        tree = client_start(self.rules, shared, kept, self.turn(number + 1, client))
        scores, attack = evaluator.score_client(client, tree), self._attack_evaluator
        if attack is None:
            return scores
        harm = {name: pair for name, pair in attack.score_client(client, tree).sums.items() if pair[1]}
        return Scores({**scores.sums, **harm})

    @cached_property
    def _attack_evaluator(self) -> Scorer | None:
        """The evaluator of an attack's success, if it shows in the outputs of personal models; else None."""
        task = self.attack.success_task(self.task) if self.attack is not None and self.method.personal else None
        return None if task is None else self.evaluator(task)
