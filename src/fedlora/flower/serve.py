"""The server app: runs a configuration, or clients with their own trainers, over Flower into a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.engines.clients import Clients
from fedlora.engines.federation import Federation
from fedlora.engines.loop import Observe, Watch
from fedlora.files import save_json
from fedlora.flower.secure_server import select_loop
from fedlora.flower.serve_trainers import TrainersRun, run_trainers_server
from fedlora.runs.config import Config, read
from fedlora.runs.file_names import TOKEN
from fedlora.runs.folder import read_json
from fedlora.runs.progress import Lines
from fedlora.runs.run import Result, Take, run_config
from fedlora.schema import ConfigError


def server_app(
    config: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    *,
    method: Any = "fedit",
    rounds: int = 20,
    clients: int | Mapping[str, Any] | Clients | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    metric: str = "loss",
    higher: bool | None = None,
    schedule: Literal["run", "turn"] = "run",
    keep_optimizer: bool = False,
    **sections: Any,
) -> ServerApp:
    """Return a ``ServerApp`` for a TOML file's federation, or for clients with their own trainers.

        app = fedlora.flower.server_app(method="fedsa-lora", rounds=20, clients=3, out="runs/three")

    Args:
        config: a TOML file, for clients of ``client_app(config)``. None: for clients of ``client_app(trainer)``. Then
            the server needs no model; it gets the settings of this call, and the clients get them from the server.
        callbacks: see ``fedlora.Callback``; they are called on the server.
        method, rounds, seed, metric, higher, schedule, keep_optimizer, sections: see ``fedlora.federate``.
        clients: their number, or the ``[clients]`` table; None: ``clients`` of the run's configuration
            (``flwr run --run-config clients=3``).
        out: the run's folder on the server's machine. ``out`` of the run's configuration comes first. If it holds the
            beginning of this run, the run goes on after its last finished round.

    Raises ``ConfigError`` for a section that does not exist, or if settings are given beside a file.
    """
    app = ServerApp()
    own = TrainersRun(clients, method, rounds, seed, metric, higher, schedule, keep_optimizer, sections)
    if config is not None and own != TrainersRun():
        raise ConfigError("server_app was given a TOML file and settings of a run; put the settings into the file.")

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        place = context.run_config.get("out", out)
        if place is None:
            raise ConfigError("the run has no folder; give server_app out=..., or set out in the run's configuration.")
        folder = Path(str(place)).expanduser()
        if config is not None:
            resolved = read(config)
            run_server(resolved, grid, folder, Lines(resolved.rounds).watch, callbacks)
        else:
            settings = own.with_clients(context.run_config.get("clients"))
            run_trainers_server(settings, grid, folder, Lines(rounds).watch, callbacks)

    return app


def run_server(
    config: Config, grid: Grid, out: Path, watch: Watch = lambda event: None, callbacks: Sequence[Any] = ()
) -> Result:
    """Run a federation's rounds over a grid into ``out`` as ``fedlora run`` would, with a checkpoint each round.

    The run's token is in ``out``: clients keep their state under it, so a resumed run has the same token. Raises
    ``ConfigError`` if ``out`` holds another run, a finished run, or one in progress, and leaves it unchanged.
    """
    token_path = out / TOKEN

    def drive(config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take) -> None:
        if not token_path.exists():
            save_json(token_path, {"run": uuid4().hex})
        token = str(read_json(token_path)["run"])
        loop = select_loop(config.flower)
        take(loop(watch, observe, federation=f, network=config.flower, token=token, grid=grid), f)

    if (out / "checkpoint.safetensors").exists():
        raise ConfigError(
            f"{str(out)!r} holds a run of an earlier version of fedlora; finish it with that version, or choose "
            "another folder."
        )
    return run_config(config, out, watch, drive=drive, again=token_path.exists(), callbacks=callbacks)
