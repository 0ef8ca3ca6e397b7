"""The composition root: a checked configuration makes the objects that an engine runs."""

import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fedlora import tasks
from fedlora.adapters import Dense
from fedlora.engines import privacy as private
from fedlora.engines.clients import Clients, Shard
from fedlora.engines.comm.compression import Transport
from fedlora.engines.federation import Federation
from fedlora.engines.network_settings import Network
from fedlora.engines.retention import Retention
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods._base import Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.local import Local
from fedlora.runs import compatibility
from fedlora.runs.trackers import Track
from fedlora.schema import ConfigError, PerMachine, Table, per_machine
from fedlora.security.attacks._base import Attack
from fedlora.security.privacy import Privacy
from fedlora.security.robust._base import Defence
from fedlora.security.validation import Hygiene
from fedlora.tasks._base import Data, Task
from fedlora.tasks.networks.pretrained import check_tokens, quantised
from fedlora.training.device import Engine, checkpoint_activations
from fedlora.training.evaluation import Evaluation
from fedlora.training.local import Training
from fedlora.training.model import Model, Precision
from fedlora.training.warm_start import begin


@dataclass(frozen=True)
class ModelTable:
    """The ``[model]`` table."""

    name: PerMachine[str]  # a hub id or a local folder
    # Modules to adapt: names, "all-linear" or a regular expression of paths; None: the query and value projections.
    targets: str | list[str] | None = None
    head: list[str] | None = None  # modules trained in full; None: what the task put on top
    start: str | None = None  # a PEFT adapter folder, held by every party, that adapters and head begin with
    same_base: PerMachine[bool | None] = None  # true: the base of ``start`` is this model, whatever it is called there
    quantize: Literal["4bit", "8bit"] | None = None  # hold the base in so many bits, on a GPU, through bitsandbytes
    overlay: bool | None = None  # keep folds beside the base weights; None: where these are multiplied in bfloat16


@dataclass(frozen=True)
class Config:
    """A whole run, checked, also where it was put together or changed (``dataclasses.replace``) in Python.

    ``table`` is the resolved TOML, every default written out: enough to repeat the run. Raises ``ValueError`` where
    settings exclude each other or are of a wrong kind.
    """

    model: ModelTable
    task: Task
    method: Method
    clients: Clients = field(default_factory=Clients)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    privacy: Privacy = field(default_factory=Privacy)
    engine: Engine = field(default_factory=Engine)
    flower: Network = field(default_factory=Network)
    hygiene: Hygiene = field(default_factory=Hygiene)
    robust: Defence | None = None
    attack: Attack | None = None
    transport: Transport = field(default_factory=Transport)
    checkpoint: Retention = field(default_factory=Retention)
    track: Track = field(default_factory=Track)
    rounds: int = 20
    seed: int = 0
    table: Table = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "table", compatibility.resolve(self))
        compatibility.check(self)

    def federation(self, party: int | None = None, combines: bool = False) -> Federation:
        """Loads the model and the data, and builds what an engine runs.

        ``party`` is the client that this machine is, and ``combines`` says that no client trains here; both matter
        only where every party has data of its own (``clients.split``).
        """
        device = self.engine.prepare()
        data, shards = self.rows(party, combines)
        names = tuple(self._label_names()) if data is None else data.label_names
        network = self.network(len(names), device)
        if data is not None:
            width = self.task.max_length if getattr(self.task, "pad_to_max_length", False) else 0
            check_tokens(network, self.model.name, {"training": data.train, "test": data.test}, width)
        training = self.engine.resolved(self.training, network)
        if training.gradient_checkpointing:
            checkpoint_activations(network)
        model = self.attached(network, typing.cast(Any, training.precision), device)
        rules = model.rules(self.method, self.head_rule)
        if self.model.start is not None:
            base = None if self.model.same_base else self.model.name
            begin(model, rules, self.method, self.model.start, self.seed, names, base)
        budgets = self.clients.budgets(self.method.adapter.budget, self.seed)
        found = Federation(
            rules, self.method, model, self.task, data, self.clients, shards, budgets,
            training, self.evaluation, self.server, self.rounds, self.seed, names, fingerprint(self.table),
            self.hygiene, self.robust,
            self.attack and self.attack.ready(self.task, self.model.name, self.clients.members, self.seed),
            self.transport,
            self.privacy,
        )  # fmt: skip
        private.check(found)
        return found

    def network(self, labels: int, device: torch.device) -> nn.Module:
        """The pretrained network, quantised where ``model.quantize`` says so."""
        kind = self.model.quantize
        loading = {} if kind is None else {"loading": quantised(kind, device)}
        return self.task.network(self.model.name, labels, self.seed, **loading)

    def rows(self, party: int | None, combines: bool) -> tuple[Data | None, Mapping[int, Shard] | Sequence[Shard]]:
        """The data of this machine and each client's rows in it; see ``federation``."""
        if not self.clients.own_data:
            data = self.task.load(self.model.name, self.seed, self.clients.client_column)
            return data, self.clients.shards(data, self.seed)
        self._label_names()
        if party is None and not combines:
            raise ConfigError(
                "clients.split is 'own': every party has its own data on its own machine; run it with "
                "`fedlora flower`, or set clients.split to a way to split one data set."
            )
        if party is None:
            return None, {}
        data = self.task.load(self.model.name, self.seed)
        return data, {party: Shard(torch.arange(len(data.train)), torch.arange(len(data.test)))}

    def _label_names(self) -> Sequence[str]:
        names = self.task.agreed()
        if names is None:
            raise ConfigError(
                "clients.split is 'own', so the labels must be agreed beforehand; set task.label_names to all of them."
            )
        return names

    def attached(self, network: nn.Module, precision: Precision = "float32", device: Any = "cpu") -> Model:
        """The network with this configuration's adapters."""
        table = self.model
        return Model.attach(network, self.method.adapter, table.targets, table.head, precision, device, table.overlay)

    def head_rule(self, dense: Dense) -> Method:
        """How a part trained in full is combined: with the method's own weights, or not at all."""
        return (FedIT if self.method.shares_head else Local)(dense, self.method.weighting)


def per_machine_settings(table: Table) -> list[str]:
    """The settings in which parties of one federation may differ, with dotted keys: those of each party's machine."""
    kinds = {"task": tasks.load(table.get("task", {}).get("name", "")), "model": ModelTable, "engine": Engine}
    return [f"{section}.{name}" for section, kind in kinds.items() for name in per_machine(kind)]


def fingerprint(table: Table) -> str:
    """A digest of all that parties must have alike: without what a node says of its machine, or the server looks at."""
    own = {*per_machine_settings(table), "training.precision"}  # a machine's precision is what it is fast at
    left = {
        section: {k: v for k, v in value.items() if f"{section}.{k}" not in own} if isinstance(value, dict) else value
        for section, value in table.items()
        if section
        not in (
            "engine",
            "compare",
            "checkpoint",
            "hygiene",
            "robust",
            "track",
        )  # the last three are the server's alone
    }
    return hashlib.blake2b(json.dumps(left, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
