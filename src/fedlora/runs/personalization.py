"""A finished run's models side by side, each client's on its own test rows.

The global model, what each client holds, that after local fine-tuning, what a client reaches alone and what one model
reaches on everybody's rows; and clients that never took part.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from fedlora.engines.checkpoint import check_run_inputs
from fedlora.engines.federation import Federation
from fedlora.engines.in_process import InProcess
from fedlora.engines.loop import Round, Watch, explain_overflow
from fedlora.files import save_json
from fedlora.rounds import client_start, client_work
from fedlora.runs.compare import CENTRALISED, for_label
from fedlora.runs.config import ConfigError, Table, build
from fedlora.runs.file_names import PERSONAL
from fedlora.runs.folder import RunFolder
from fedlora.tasks._base import Shard
from fedlora.tasks.metrics.scores import Scores
from fedlora.training.evaluation import Evaluator, summarize
from fedlora.training.local import LocalTrainer
from fedlora.types import Tree

ALONE = "local"  # the method that sends nothing
By = dict[int, Scores]  # client -> what a model scores on its test rows


@dataclass
class Sides:
    """One run's federation, loaded again, with its base updates in the base; ``steps`` are those of the fine-tuning.

    ``ValueError`` where its data or its model have changed since.
    """

    run: RunFolder
    steps: int
    f: Federation = field(init=False)
    evaluator: Evaluator = field(init=False)

    def __post_init__(self):
        self.f = self.run.config.federation()
        check_run_inputs(self.run.path, self.f)
        self.f.model.fold({part: (factors,) for part, factors in self.run.base_updates.items()})
        self.evaluator = self.f.evaluator()

    def everyones(self, clients: Iterable[int]) -> By | None:
        """The global model as it stands; None for a method that has none."""
        if self.f.method.personal:
            return None
        return {client: self.evaluator.score_client(client, self.run.shared) for client in clients}

    def held(self, client: int) -> Tree:
        """What a client holds after the last round; a new one, what it would start from."""
        kept = self.run.kept(client) if client < self.f.clients.members else {}
        return client_start(self.f.rules, self.run.shared, kept, self.f.turn(self.run.summary["rounds"], client))

    def tuned(self, client: int) -> Tree:
        """That after ``steps`` steps on its own training rows, of what the method would train in its next turn.

        A fresh optimiser, and a constant learning rate: the run's own schedule has come to its end.
        """
        f, turn = self.f, self.f.turn(self.run.summary["rounds"], client)
        assert f.data is not None, "clients train on rows"
        training = replace(
            f.training, local_steps=self.steps, local_epochs=None, schedule="constant", warmup=0.0, keep_optimizer=False
        )
        trainer = LocalTrainer(f.model, f.task, f.data.train, f.shards[client], training, turn, f.rounds)
        return {part: work.end for part, work in client_work(f.rules, self.held(client), turn, trainer).items()}

    def columns(self, clients: Iterable[int]) -> dict[str, By | None]:
        """The run's own models."""
        return {
            "global": self.everyones(clients),
            "held": {client: self.evaluator.score_client(client, self.held(client)) for client in clients},
            "tuned": {client: self.evaluator.score_client(client, self.tuned(client)) for client in clients},
        }

    def alone(self, watch: Watch) -> By:
        """Every client for itself, in the same rounds and with the same steps from the same start."""
        f, last = _trained(self.run, ALONE, watch)
        scorer = f.evaluator()
        return {
            client: f.score_client(scorer, last.number, client, last.shared, last.kept.get(client, {}))
            for client in range(f.clients.members)
        }

    def together(self, clients: Iterable[int], watch: Watch) -> By:
        """One model on the training rows of all clients that took part, with their cohort's steps."""
        f = self.f
        rows = torch.cat([f.shards[client].train for client in range(f.clients.members)]).sort().values
        one, last = _trained(self.run, CENTRALISED, watch, f, Shard(rows, f.shards[0].test))
        scorer = Evaluator(one.model, f.task, self.evaluator.test, f.shards, f.evaluation.batch_size)
        return {client: scorer.score_client(client, last.shared) for client in clients}


def personal(run: RunFolder, steps: int = 20, watch: Watch = lambda event: None) -> dict[str, Any]:
    """Scores all of them, writes ``personal.json`` into the run's folder and returns what is in it.

    Each column is ``evaluation.summary`` of the clients that took part, or None where there is no such model; ``new``
    has the same of the clients that never did. ``ConfigError`` where the rows are not on this machine,
    ``ValueError`` where they or the model are not those of the run any more.
    """
    config = run.config
    if config.clients.own_data:
        raise ConfigError(
            "clients.partition is 'own', so the rows are on the clients' machines; `fedlora personal` needs a run "
            "whose rows are all here."
        )
    if not run.summary["rounds"]:
        raise ConfigError(f"{str(run.path)!r} has no finished round; run it to the end of one.")
    members, count = config.clients.members, config.clients.count
    sides = Sides(run, steps)
    own, new = sides.columns(range(members)), sides.columns(range(members, count)) if config.clients.new else {}
    together = sides.together(range(count), watch)
    own |= {ALONE: sides.alone(watch), CENTRALISED: {k: x for k, x in together.items() if k < members}}
    new |= {CENTRALISED: {k: x for k, x in together.items() if k >= members}} if new else {}
    found = {
        **{key: run.summary[key] for key in ("method", "title", "personal", "metric", "seed", "rounds")},
        "steps": steps,
        "columns": _summaries(sides.f, own),
        "new": _summaries(sides.f, new),
    }
    save_json(run.path / PERSONAL, found)
    return found


def _summaries(f: Federation, columns: Mapping[str, By | None]) -> dict[str, Any]:
    count, able = f.clients.count, f.clients.capabilities(f.seed)
    return {
        name: None if scores is None else summarize(scores, f.task.metric, count, able)
        for name, scores in columns.items()
    }


def _trained(
    run: RunFolder, label: str, watch: Watch, of: Federation | None = None, shard: Shard | None = None
) -> tuple[Federation, Round]:
    """The run's configuration under another method, as many rounds of it; ``shard`` has the rows of its only client."""
    f = build(_here(run.config.table, label, run.config.rounds)).federation()
    if of is not None and shard is not None:
        f = replace(f, data=of.data, shards=[shard])
    return f, deque(islice(explain_overflow(InProcess(watch).run(f)), run.summary["rounds"]), maxlen=1)[0]


def _here(table: Table, label: str, rounds: int) -> Table:
    """In this process, and evaluated at the end only."""
    own = for_label({key: value for key, value in table.items() if key != "flower"}, label)
    engine = {**own.get("engine", {}), "name": "inprocess", "offload": False}
    return {**own, "engine": engine, "evaluation": {**own.get("evaluation", {}), "every": rounds, "measure": False}}
