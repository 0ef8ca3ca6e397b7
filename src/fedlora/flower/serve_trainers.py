"""The server of clients with their own trainers: it has no model, so it asks the clients for theirs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedlora.engines.clients import Clients
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Observe, Watch
from fedlora.engines.model_spec import ModelSpec, RemoteModel
from fedlora.engines.network_settings import Network
from fedlora.files import load_about, load_tree, save_json, save_tree
from fedlora.flower.model_query import ModelQuery
from fedlora.flower.secure_server import select_loop
from fedlora.flower.terms import Terms
from fedlora.runs.config import Config
from fedlora.runs.federate import build_clients, check_sections, config_of_adapter, describe_task
from fedlora.runs.file_names import TOKEN
from fedlora.runs.folder import RunFolder, read_json
from fedlora.runs.run import Result, Take, run_config
from fedlora.schema import ConfigError, construct

MODEL = "model.safetensors"  # in a run's folder: the first client's description of its model, and its first leaves
TRAINER = "the clients' own"  # in config.toml


@dataclass(frozen=True)
class TrainersRun:
    """The settings of a run: the arguments of ``fedlora.federate`` without the trainer."""

    clients: int | Mapping[str, Any] | Clients | None = None
    method: Any = "fedit"
    rounds: int = 20
    seed: int = 0
    metric: str = "loss"
    higher: bool | None = None
    schedule: str = "run"
    keep_optimizer: bool = False
    sections: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sections(self.sections)
        _ = self.task  # raises for a wrong schedule

    def with_clients(self, count: object) -> "TrainersRun":
        """Return the settings with the number of clients of the run's configuration, if they have none."""
        if self.clients is None and not (type(count) is int and count > 0):
            raise ConfigError(f"the number of clients is {count!r}; give it to server_app, as clients=3.")
        return self if self.clients is not None else replace(self, clients=count)  # type: ignore[arg-type]

    @property
    def task(self) -> dict[str, Any]:
        """The ``[task]`` table."""
        return describe_task(TRAINER, self.metric, self.higher, self.schedule, self.keep_optimizer)

    @property
    def network(self) -> Network:
        """The ``[flower]`` table."""
        own = self.sections.get("flower") or {}
        return own if isinstance(own, Network) else construct(Network, "flower", dict(own))

    def config(self, model: RemoteModel) -> Config:
        """Return the configuration of the run on the clients' model. Raises ``ConfigError`` for wrong settings."""
        spec, clients = model.spec, build_clients(self.clients)
        return config_of_adapter(
            spec.adapter, spec.name, self.task, self.method, clients, self.rounds, self.seed, spec.training,
            self.sections, model,
        )  # fmt: skip


def run_trainers_server(
    settings: TrainersRun, grid: Grid, out: Path, watch: Watch = lambda event: None, callbacks: Sequence[Any] = ()
) -> Result:
    """Run a federation of clients with their own trainers over a grid into ``out``, with a checkpoint each round.

    If ``out`` holds the beginning of this run, it goes on after the last finished round. Raises ``ConfigError`` for
    wrong settings or another run in ``out``, and ``ValueError`` if no client describes its model.
    """
    again = (out / TOKEN).exists()
    if again:
        token, model = str(read_json(out / TOKEN)["run"]), load_remote_model(out)
    else:
        with RunFolder(out).claim(False):
            pass  # before the clients load anything
        count = build_clients(settings.clients).count
        table = {"clients": {"count": count}, "seed": settings.seed, "task": settings.task}
        query = ModelQuery(grid, table, count, settings.network, watch)
        token, model = query.run, query.fetch_model()

    def drive(config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take) -> None:
        if not again:
            save_tree(out / MODEL, model.first_leaves, {"about": json.dumps({"model": model.spec.to_json()})})
            save_json(out / TOKEN, {"run": token})
        terms = Terms.of(config.table, model.spec, model.trainable_start)
        loop = select_loop(config.flower)
        take(loop(watch, observe, federation=f, network=config.flower, token=token, grid=grid, terms=terms), f)

    return run_config(settings.config(model), out, watch, drive=drive, again=again, callbacks=callbacks)


def load_remote_model(out: Path) -> RemoteModel:
    """Return the model of the run in a folder. Raises ``ConfigError`` if the folder holds none."""
    if not (out / MODEL).exists():
        raise ConfigError(
            f"{str(out)!r} holds a run whose clients have no trainers of their own; go on with its own app."
        )
    return RemoteModel(ModelSpec.from_json(load_about(out / MODEL)["model"]), load_tree(out / MODEL))
