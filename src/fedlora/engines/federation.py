"""A federation: all that a run needs, built and checked, whichever engine runs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from fedlora.adapters import Dense
from fedlora.engines import privacy as private
from fedlora.engines.clients import Clients, Shard
from fedlora.engines.comm.compression import Transport
from fedlora.engines.privacy_ledger import Book
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, received
from fedlora.security.attacks._base import Attack
from fedlora.security.privacy import Privacy, Stream, key_of
from fedlora.security.robust._base import RobustAggregator
from fedlora.security.validation import Validation
from fedlora.seeds import derived
from fedlora.tasks._base import Data, Task
from fedlora.tasks.data.labels import label_map
from fedlora.tasks.metrics.scores import Scores
from fedlora.training.evaluation import Evaluation, Evaluator
from fedlora.training.local import Training
from fedlora.training.model import Model
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
    hygiene: Validation = field(default_factory=Validation)
    robust: RobustAggregator | None = None
    attack: Attack | None = None
    transport: Transport = field(default_factory=Transport)
    privacy: Privacy = field(default_factory=Privacy)

    @cached_property
    def key(self) -> bytes:
        """What this machine's draws for privacy come from."""
        return key_of(None if self.privacy.secret else self.seed)

    @cached_property
    def noise(self) -> float:
        """The noise multiplier of the run, where there is privacy."""
        return private.noise(self)

    @cached_property
    def book(self) -> Book:
        """What goes into the figures of privacy, counted as the rounds go by."""
        return Book(self)

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, in order."""
        if round not in self._cohorts:
            self._cohorts[round] = self.clients.cohort(round, self.drawn)
        return self._cohorts[round]

    def order(self, round: int) -> list[int]:
        """The cohort first, then who stands in for the absent; with privacy nobody: no account knows a stand-in."""
        return self.cohort(round) if self.privacy.on else self.clients.order(round, self.seed)

    @cached_property
    def _cohorts(self) -> dict[int, list[int]]:
        return {}

    @property
    def drawn(self) -> int:
        """The seed of the cohorts: the run's, but a secret of this machine's where a sample must not be known."""
        return Stream(self.key).seed if self.privacy.secret and self.clients.rate is not None else self.seed

    def turn(self, round: int, client: int) -> Turn:
        """A client's part in a round, its seed included."""
        return Turn(round, client, self.budgets[client], derived(self.seed, "turn", round, client))

    def spends(self, round: int, client: int) -> Training:
        """``[training]`` as a client has it in a round: with its own number of steps where clients differ in that."""
        usual = self.training.steps(len(self.shards[client].train))
        steps = self.clients.steps(usual, round, client, self.seed)
        return self.training if steps == usual else replace(self.training, local_steps=steps, local_epochs=None)

    def work(self, upload: Received) -> int:
        """The optimiser steps that a client was to do for an upload, by the rows that it claims."""
        turn = upload.turn
        return self.clients.steps(self.training.steps(upload.examples), turn.round, turn.client, self.seed)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell a user: of the method's settings, and of how this machine's rows were read and shared out."""
        caution = () if self.method.caution is None else (self.method.caution,)
        if self.data is None:
            return caution
        lost = self.clients.splitter.left_out(self.data.train, self.data.test, self.clients.count)
        return (*caution, *self.data.notes, *([lost] if lost else []))

    def label_map(self, reading: str) -> dict[str, str]:
        """Which value of a label column is which class by a reading (one of ``labels.READINGS``)."""
        return label_map(self.task.all_labels() or self.label_names, self.label_names, reading)

    @property
    def heads(self) -> frozenset[str]:
        """The parts trained in full."""
        return frozenset(part for part, rule in self.rules.items() if isinstance(rule.adapter, Dense))

    def evaluator(self, task: Task | None = None) -> Evaluator:
        """Scores trees on the test rows of this machine, by the run's task or another one on the same rows."""
        assert self.data is not None, "only a machine with data evaluates"
        return Evaluator(self.model, task or self.task, self.data.test, self.shards, self.evaluation.batch_size)

    def scores(self, evaluator: Evaluator, number: int, client: int, shared: Tree, kept: Tree) -> Scores:
        """What a client holds after round ``number``, on its own test rows; with a personal method, how far an attack
        came there, too."""
        tree = received(self.rules, shared, kept, self.turn(number + 1, client))
        own = evaluator.client(client, tree)
        if self._judge is None:
            return own
        harm = {name: pair for name, pair in self._judge.client(client, tree).sums.items() if pair[1]}
        return Scores({**own.sums, **harm})

    @cached_property
    def _judge(self) -> Evaluator | None:
        """Of a personal method's models, where there is an attack that one can see in what they say."""
        judge = self.attack.success_task(self.task) if self.attack is not None and self.method.personal else None
        return None if judge is None else self.evaluator(judge)
