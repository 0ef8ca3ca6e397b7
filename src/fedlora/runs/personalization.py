"""Score several models of a finished run, each on the clients' own test rows.

These are the global model, each client's model, the same after local fine-tuning, a client's model without any
communication, and one model trained on the rows of all clients; also for clients that never took part.
"""

from collections import deque
from collections.abc import Iterable
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
from fedlora.runs.config import build
from fedlora.runs.file_names import PERSONAL
from fedlora.runs.folder import RunFolder
from fedlora.schema import ConfigError
from fedlora.tasks._base import Shard
from fedlora.tasks.metrics.scores import Scores
from fedlora.training.evaluation import Evaluator, summarize
from fedlora.training.local import LocalTrainer
from fedlora.types import Tree

ALONE = "local"  # the method without communication
ClientScores = dict[int, Scores]  # client -> the scores of a model on its test rows


@dataclass
class PersonalModels:
    """The models of a run. Raises ``ValueError`` if its data or its pretrained model have changed."""

    run: RunFolder
    steps: int  # of the fine-tuning
    f: Federation = field(init=False)  # with the run's base updates
    evaluator: Evaluator | None = field(init=False)  # None in a rehearsal: each party has its own

    def __post_init__(self):
        self.f = self.run.config.federation()
        check_run_inputs(self.run.path, self.f)
        self.f.model.fold({part: (factors,) for part, factors in self.run.base_updates.items()})
        self.evaluator = None if self.f.parties else self.f.evaluator()

    def score_tree(self, client: int, tree: Tree) -> Scores:
        """Score a tree on a client's own test rows."""
        return (self.evaluator or self.f.for_client(client).evaluator()).score_client(client, tree)

    def client_tree(self, client: int) -> Tree:
        """Return a client's leaves after the last round, or those that a new client would start from."""
        kept = self.run.kept_leaves(client) if client < self.f.clients.members else {}
        return client_start(self.f.rules, self.run.shared, kept, self.f.turn(self.run.summary["rounds"], client))

    def fine_tune(self, client: int) -> Tree:
        """Return a client's leaves after ``steps`` more steps on its training rows.

        Trains the leaves of the method's next turn, with a new optimiser and a constant learning rate, since the run's
        schedule has ended.
        """
        f, turn = self.f.for_client(client), self.f.turn(self.run.summary["rounds"], client)
        assert f.data is not None, "clients train on rows"
        training = replace(
            f.training, local_steps=self.steps, local_epochs=None, schedule="constant", warmup=0.0, keep_optimizer=False
        )
        trainer = LocalTrainer(f.model, f.task, f.data.train, f.shards[client], training, turn, f.rounds)
        return {part: work.end for part, work in client_work(f.rules, self.client_tree(client), turn, trainer).items()}

    def score(self, clients: Iterable[int]) -> dict[str, ClientScores | None]:
        """Score the run's models; None stands for a global model that the method does not have."""
        score, shared = self.score_tree, None if self.f.method.personal else self.run.shared
        return {
            "global": None if shared is None else {client: score(client, shared) for client in clients},
            "held": {client: score(client, self.client_tree(client)) for client in clients},
            "tuned": {client: score(client, self.fine_tune(client)) for client in clients},
        }

    def score_alone(self, watch: Watch) -> ClientScores:
        """Score clients that train alone, with the same start, rounds and steps."""
        f, last = _train(self.run, ALONE, watch)
        scorer, scores = None if f.parties else f.evaluator(), {}
        for client in range(f.clients.members):
            own, kept = f.for_client(client), last.kept.get(client, {})
            scores[client] = own.score_client(scorer or own.evaluator(), last.number, client, last.shared, kept)
        return scores

    def score_centralised_model(self, clients: Iterable[int], watch: Watch) -> ClientScores:
        """Score one model on the training rows of all clients that took part, with the steps of their cohort."""
        f, evaluator = self.f, self.evaluator
        assert evaluator is not None, "the rows are in one data set"
        rows = torch.cat([f.shards[client].train for client in range(f.clients.members)]).sort().values
        f_central, last = _train(self.run, CENTRALISED, watch, data=f.data, shards=[Shard(rows, f.shards[0].test)])
        scorer = Evaluator(f_central.model, f.task, evaluator.test, f.shards, f.evaluation)
        return {client: scorer.score_client(client, last.shared) for client in clients}


def evaluate_personalization(run: RunFolder, steps: int = 20, watch: Watch = lambda event: None) -> dict[str, Any]:
    """Score all models, write ``personal.json`` into the run's folder and return its content.

    A column is the ``evaluation.summarize`` of the clients that took part, or None without such a model; ``new`` has
    the same columns for the clients that never took part. Raises ``ConfigError`` if the rows are not on this machine,
    and ``ValueError`` if they or the pretrained model have changed.
    """
    config = run.config
    if config.clients.own_data and not config.party:
        raise ConfigError(
            "clients.partition is 'own', so the rows are on the clients' machines; `fedlora personal` needs a run "
            "whose rows are all here."
        )
    if not run.summary["rounds"]:
        raise ConfigError(f"{str(run.path)!r} has no finished round; run it to the end of one.")
    members, count = config.clients.members, config.clients.count
    models = PersonalModels(run, steps)
    f, score = models.f, models.score
    current, new = score(range(members)), score(range(members, count)) if config.clients.new else {}
    # Parties have rows in columns of their own, which no machine could pool.
    centralised = {} if config.party else models.score_centralised_model(range(count), watch)
    pooled = {k: x for k, x in centralised.items() if k < members} or None
    current |= {ALONE: models.score_alone(watch), CENTRALISED: pooled}
    new |= {CENTRALISED: {k: x for k, x in centralised.items() if k >= members}} if new else {}
    capabilities = f.clients.capabilities(f.seed)
    summaries = [
        {
            name: x if x is None else summarize(x, f.task.metric, count, capabilities, f.task.is_higher_better)
            for name, x in columns.items()
        }
        for columns in (current, new)
    ]
    result = {
        **{key: run.summary[key] for key in ("method", "title", "personal", "metric", "seed", "rounds")},
        "steps": steps,
        "columns": summaries[0],
        "new": summaries[1],
    }
    save_json(run.path / PERSONAL, result)
    return result


def _train(run: RunFolder, label: str, watch: Watch, **changes: Any) -> tuple[Federation, Round]:
    """Run the configuration under another method for as many rounds, in this process, without evaluations."""
    table = for_label({key: value for key, value in run.config.table.items() if key != "flower"}, label)
    table["engine"] = {**table.get("engine", {}), "name": "inprocess", "offload": False}
    table["evaluation"] = {**table.get("evaluation", {}), "every": run.config.rounds, "measure": False}
    f = replace(build(table).federation(), **changes)
    with explain_overflow():
        return f, deque(islice(InProcess(watch).run(f), run.summary["rounds"]), maxlen=1)[0]
