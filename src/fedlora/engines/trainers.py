"""The trainers of clients, built by a function of the caller; all trainers of a process share one model."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from fedlora.seeds import derive_seed
from fedlora.tasks._base import Shard
from fedlora.tasks.metrics.scores import Scores, pool
from fedlora.training.evaluation import Scorer, is_same_tree
from fedlora.training.local import OptimizerState, Training
from fedlora.training.model import Model
from fedlora.training.open_model import open_model
from fedlora.training.own_trainer import OwnTrainer, set_seeds
from fedlora.training.ranks import barrier, check_equal
from fedlora.training.shared_base import SharedBases
from fedlora.training.transformers_trainer import (
    Schedule,
    TransformersTurn,
    adopt_model,
    check_trainer,
    describe_training,
    evaluate_trainer,
    is_transformers_trainer,
)
from fedlora.types import Tree, Turn

Value = float | tuple[float, int]  # a metric, or its sum over rows and their number
Divide = Callable[[int], Mapping[int, list[int]]]  # a run's seed -> each client's rows of common data
Evaluate = Callable[[Any, "ClientInfo"], Mapping[str, Value]]


@dataclass(frozen=True)
class ClientInfo:
    """The argument of the caller's function: the client whose trainer it builds."""

    number: int  # from 0
    count: int  # of clients
    seed: int  # of the run
    rows: list[int] | None = None  # its rows of the data that the run divides; None if each client has its own
    model: Any = None  # the network of this process, with its adapter; None for the first trainer
    config: Mapping[str, Any] = field(default_factory=dict)  # the configuration of its node, in a deployment


@dataclass
class Trainers:
    """The trainers of a process, each built when its client is first needed, and kept.

    ``make(client)`` returns the trainer of a client. All trainers train the network of the first one. A Trainer of
    transformers gets it in place of its own; any other trainer must be built on ``client.model``. A pretrained network
    that ``make`` loads by its name again shares the tensors of the first.
    """

    make: Callable[[ClientInfo], Any]
    count: int
    seed: int
    evaluate: Evaluate | None = None  # metrics of a network for a client; None: the trainer's own ``evaluate``
    schedule: Schedule = "run"
    keep_optimizer: bool = False
    divide: Divide | None = None  # seed -> each client's rows of common data
    config: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0  # the client whose trainer brings the network
    losses_obstacle: ClassVar[str] = "the loss is inside the caller's own loop"
    bases: SharedBases = field(default_factory=SharedBases, repr=False)
    has_run: bool = field(default=False, init=False)
    _trainers: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def rows(self) -> Mapping[int, list[int]]:
        """Each client's rows of the common data; empty if each client has its own."""
        return {} if self.divide is None else self.divide(self.seed)

    @cached_property
    def model(self) -> Model:
        """The model of this process, with the adapter of the first trainer."""
        trainer = self._build(self.first)
        self._trainers[self.first] = trainer
        model = open_model(trainer.model)
        model.synchronize()
        return model

    def for_run(self, seed: int) -> "Trainers":
        """Return the trainers of a run: these for the first run, and new ones on the restored base after it."""
        if not self.has_run and seed == self.seed:
            self.has_run = True
            return self
        own = replace(self, seed=seed)
        own.has_run = True
        return own

    def info(self, client: int) -> ClientInfo:
        """Return the description of a client."""
        network = self.model.network if "model" in self.__dict__ else None
        return ClientInfo(client, self.count, self.seed, self.rows.get(client), network, self.config)

    def get(self, client: int) -> Any:
        """Return the trainer of a client."""
        network = self.model.network
        if client not in self._trainers:
            trainer = self._build(client)
            if is_transformers_trainer(trainer):
                self._check_alike(client, trainer.model)
                adopt_model(trainer, network)
            elif trainer.model is not network:
                raise ValueError(
                    f"client {client}'s trainer has a model of its own; build it on client.model, which is the model "
                    "of the first trainer, so that the base is in memory once."
                )
            self._trainers[client] = trainer
        return self._trainers[client]

    def _build(self, client: int) -> Any:
        # One seed for all clients: parts that are drawn, such as a head, begin equal.
        with set_seeds(derive_seed(self.seed, "trainer")), self.bases.share_loads():
            trainer = self.make(self.info(client))
        missing = [name for name in ("model", "train") if not hasattr(trainer, name)]
        if missing:
            raise ValueError(
                f"the function returned a {type(trainer).__name__} without .{missing[0]} for client {client}; return a "
                "Trainer, or an object with .model and .train()."
            )
        if is_transformers_trainer(trainer):
            check_trainer(trainer)
        return trainer

    def _check_alike(self, client: int, network: Any) -> None:
        """Raise ``ValueError`` if a trainer was made with another adapter than the first one."""
        if network is self.model.network:
            return
        mine = {path: part.adapter for path, part in self.model.parts.items()}
        theirs = {path: part.adapter for path, part in open_model(network).parts.items()}
        for path in sorted(mine.keys() | theirs.keys()):
            if mine.get(path) != theirs.get(path):
                raise ValueError(
                    f"client {client}'s model has {theirs.get(path)} at {path!r}, and client {self.first}'s "
                    f"{mine.get(path)}; give all clients one adapter, and smaller ranks by clients.ranks."
                )
        if (name := self.model.find_other_weight(network)) is not None:
            raise ValueError(
                f"client {client}'s model has another {name!r} than client {self.first}'s; start all clients from one "
                "base, and name modules that the checkpoint lacks, such as a new head, in modules_to_save."
            )

    def build_turn(
        self, turn: Turn, rounds: int, moments: OptimizerState | None, step_done: Callable[[], None]
    ) -> OwnTrainer:
        """Return the local trainer of a client's turn."""
        trainer = self.get(turn.client)
        rows = count_examples(trainer, turn.client)  # an error ends the run before any training
        check_equal(f"client {turn.client}'s number of training rows", rows)
        values = (self.model, trainer, turn, rounds, self.keep_optimizer, moments, step_done)
        if is_transformers_trainer(trainer):
            return TransformersTurn(*values, schedule=self.schedule)
        return OwnTrainer(*values)

    def describe_training(self) -> Training:
        """Return the ``[training]`` table with the first trainer's settings if they are known."""
        first = self.get(self.first)
        training = describe_training(first) if is_transformers_trainer(first) else Training()
        return training if self.schedule == "run" else replace(training, schedule="constant")

    @property
    def shards(self) -> "LazyShards":
        """Each client's numbers of training and test rows, as shards. Reading one builds the client's trainer."""
        return LazyShards(self.count, self._count_rows)

    def _count_rows(self, client: int) -> Shard:
        trainer = self.get(client)
        tests = getattr(trainer, "eval_dataset", None)
        return number_rows(count_examples(trainer, client), len(tests) if hasattr(tests, "__len__") else 0)

    def evaluator(self) -> Scorer | None:
        """Return an evaluator; None if no function was given and the first trainer has no ``eval_dataset``."""
        first = self.get(self.first)
        if self.evaluate is None and getattr(first, "eval_dataset", None) is None:
            return None
        # A trainer is built before its client's leaves are loaded: building it may change the network.
        return OwnEvaluator(self.model, self.count, self.score, self.get)

    def score(self, client: int) -> Scores:
        """Return the scores of the loaded leaves on a client's own test rows."""
        barrier()
        self.model.network.eval()
        with set_seeds(derive_seed(self.seed, "evaluation", client)), torch.no_grad():
            if self.evaluate is not None:
                return to_scores(self.evaluate(self.model.network, self.info(client)), client)
            metrics, rows = evaluate_trainer(self.get(client))
        return Scores({name: (value * rows, rows) for name, value in metrics.items()})


@dataclass
class OwnEvaluator:
    """Scores trees with the caller's own code: ``score(client)`` returns the scores of the loaded leaves.

    The last tree's scores are kept. ``prepare(client)`` is called before a tree is loaded for the client.
    """

    model: Model
    count: int  # of clients
    score: Callable[[int], Scores]
    prepare: Callable[[int], object] = lambda client: None
    _tree: Tree | None = None
    _base_version: int = -1
    _scores: dict[int, Scores] = field(default_factory=dict)

    def score_all(self, tree: Tree) -> Scores:
        """Return the scores of a tree on all clients' test rows together."""
        return pool([self.score_client(client, tree) for client in range(self.count)])

    def score_client(self, number: int, tree: Tree) -> Scores:
        """Return the scores of a tree on one client's test rows."""
        version = self.model.base_version
        if self._tree is None or self._base_version != version or not is_same_tree(tree, self._tree):
            self._tree, self._base_version, self._scores = tree, version, {}
        if number not in self._scores:
            self.prepare(number)
            self.model.load(tree)
            self._scores[number] = self.score(number)
        return self._scores[number]


@dataclass(frozen=True)
class LazyShards(Mapping[int, Shard]):
    """The shards of clients 0 to ``count - 1``, each read when it is needed."""

    count: int
    read: Callable[[int], Shard]

    def __getitem__(self, client: int) -> Shard:
        if not 0 <= client < self.count:
            raise KeyError(client)
        return self.read(client)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


def number_rows(train: int, test: int = 0) -> Shard:
    """Return the shard of a client whose rows are known by their number only."""
    return Shard(torch.arange(train), torch.arange(test))


def count_examples(trainer: Any, client: int) -> int:
    """Return the number of a trainer's training rows, or its attribute ``examples``."""
    rows = getattr(trainer, "examples", None)
    if rows is None:
        data = getattr(trainer, "train_dataset", None)
        rows = len(data) if hasattr(data, "__len__") else None
    if rows is None:
        raise ValueError(
            f"it is unknown how many rows client {client} trains on; give its trainer an attribute examples, the "
            "number, or a train_dataset with a length."
        )
    if rows < 1:
        raise ValueError(f"client {client} has {rows} training rows; a client needs at least one.")
    return int(rows)


def to_scores(metrics: Mapping[str, Value], client: int) -> Scores:
    """Return the scores of an ``evaluate`` function. A metric without a number of rows counts as one row."""
    sums = {}
    for name, value in metrics.items():
        total, rows = value if isinstance(value, tuple) else (float(value), 1)
        if rows < 1 or not math.isfinite(total):
            raise ValueError(
                f"evaluate returned {value!r} for {name!r} of client {client}; return a finite number, or a sum over "
                "rows and their number."
            )
        sums[name] = (float(total), int(rows))
    return Scores(sums)
