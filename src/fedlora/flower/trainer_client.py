"""The client's side of a run with trainers of its own: model and trainers of a process, made for the run's terms."""

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedlora.engines.model_spec import ModelSpec, describe_model
from fedlora.engines.network_settings import Network
from fedlora.engines.trainers import Divide, Evaluate, Trainers
from fedlora.flower.client import Node, SharedBase
from fedlora.flower.client_store import ClientStore
from fedlora.flower.requirements import RefusedTermsError, check_terms
from fedlora.flower.terms import START, TERMS, Terms
from fedlora.flower.wire import QUERY, encode_answer, tree_to_record
from fedlora.runs.build import build_own_federation
from fedlora.runs.config import build
from fedlora.runs.federate import name_of_network
from fedlora.schema import Table
from fedlora.training.open_model import find_adapter

MODEL = "model"  # the name of a record
FILE = "terms.safetensors"  # in a run's folder of a client's state


@dataclass
class TrainerClient:
    """Answers as a client, or as all clients of a simulation, with trainers that ``make(client)`` builds.

    ``make`` and ``evaluate`` are those of ``fedlora.federate``. ``is_simulated`` is whether server and clients belong
    to one user, so that nothing that the server sets is refused.
    """

    make: Any
    evaluate: Evaluate | None = None
    requires: Mapping[str, Any] = field(default_factory=dict)
    accepts: Collection[str] = ()
    is_simulated: bool = False
    divide: Divide | None = None  # of a simulation's common data
    engine: Table = field(default_factory=dict)  # the settings ``[engine]`` of this machine

    def describe(self, content: RecordDict, client: int, folder: Path, config: Mapping[str, Any]) -> RecordDict:
        """Answer the queries before a run: the client's number, and the description of its model and first leaves."""
        question = content[QUERY]
        if question["ask"] == "number":
            return encode_answer({"client": client}, "")
        loaded = self._load_trainers(json.loads(str(question["table"])), client, folder, config)
        answer = encode_answer({"client": client}, "")
        answer[MODEL] = ConfigRecord({MODEL: loaded.spec.to_json()})
        if leaves := loaded.trainers.model.first_leaves:
            answer[START] = tree_to_record(leaves)
        return answer

    def load(self, run: str, content: RecordDict, client: int, folder: Path, config: Mapping[str, Any]) -> Node:
        """Return a client's node, with its state for a run in ``folder``. The first message brings the run's terms."""
        store, loaded = ClientStore(folder / run), _LOADED.get(str(folder))
        path = store.folder / FILE
        if TERMS in content or not path.exists():
            terms = self._accept_terms(run, content, path)
        elif loaded is not None and loaded.run == run and loaded.base is not None:
            return Node(loaded.base, client, store, loaded.network)
        else:
            terms = Terms.load(path)
        loaded = self._load_base(run, terms, client, folder, config)
        assert loaded.base is not None
        return Node(loaded.base, client, store, loaded.network)

    def _accept_terms(self, run: str, content: RecordDict, path: Path) -> Terms:
        """Return the terms of a message, checked, and keep them in a file for the next process."""
        terms = Terms.from_records(content)
        if not self.is_simulated:
            check_terms(terms.table, self.requires, self.accepts)
        if not path.exists() or Terms.load(path).texts != terms.texts:
            if not self.is_simulated:
                print(f"fedlora: run {run}: {terms.describe()}", file=sys.stderr, flush=True)
            terms.save(path)
        return terms

    def _load_base(
        self, run: str, terms: Terms, client: int, folder: Path, config: Mapping[str, Any]
    ) -> "LoadedTrainers":
        """Return this process's model with the run's first leaves, and no base update."""
        loaded = self._load_trainers(terms.table, client, folder, config)
        if loaded.base is not None and (loaded.run, loaded.texts) == (run, terms.texts):
            return loaded
        if difference := loaded.spec.find_difference(terms.spec):
            raise RefusedTermsError(difference)
        loaded.base = None
        loaded.trainers.model.unfold()
        loaded.trainers.model.start_at(terms.start)
        own = {key.removeprefix("engine."): x for key, x in config.items() if key.startswith("engine.")}
        resolved = build({**terms.table, "engine": {**self.engine, **own}})
        resolved.engine.prepare()
        federation = build_own_federation(resolved, loaded.trainers.model, loaded.trainers.shards, loaded.trainers)
        loaded.base = SharedBase(federation, terms.spec)
        loaded.run, loaded.texts, loaded.network = run, terms.texts, resolved.flower
        return loaded

    def _load_trainers(self, table: Table, client: int, folder: Path, config: Mapping[str, Any]) -> "LoadedTrainers":
        """Return the model of this process; it stays in memory while runs ask for the same trainers."""
        objects = table["task"]["objects"]
        schedule, keep = objects.get("schedule", "run"), objects.get("keep_optimizer") == "true"
        recipe = (table["clients"]["count"], table["seed"], schedule, keep)
        loaded = _LOADED.get(str(folder))
        if loaded is None or loaded.recipe != recipe:
            _LOADED.pop(str(folder), None)  # before another model is loaded
            node_config = {} if self.is_simulated else dict(config)
            trainers = Trainers(
                self.make, recipe[0], recipe[1], self.evaluate, schedule, keep, self.divide, node_config, client
            )
            loaded = _LOADED[str(folder)] = LoadedTrainers(recipe, trainers, describe_trainers(trainers))
        return loaded


@dataclass
class LoadedTrainers:
    """The trainers of a process, and the federation of the run that they are used in."""

    recipe: tuple[Any, ...]  # of the trainers
    trainers: Trainers
    spec: ModelSpec
    run: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)  # of the run's terms
    base: SharedBase | None = None
    network: Network = field(default_factory=Network)


_LOADED: dict[str, LoadedTrainers] = {}  # by state folder: one in a client process, and one in a simulation


def describe_trainers(trainers: Trainers) -> ModelSpec:
    """Return the description of the trainers' model, before any base update."""
    model = trainers.model
    return describe_model(
        model, name_of_network(model.network), find_adapter(model), trainers.describe_training(),
        trainers.evaluator() is not None,
    )  # fmt: skip
