"""The server app of a configuration: runs it over Flower into a folder, and resumes it from there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.engines.federation import Federation
from fedlora.engines.loop import Observe, Watch
from fedlora.files import save_json
from fedlora.flower.secure_server import select_loop
from fedlora.runs.config import Config, ConfigError, read
from fedlora.runs.file_names import TOKEN
from fedlora.runs.folder import read_json
from fedlora.runs.progress import Lines
from fedlora.runs.run import Result, Take, run

OLD = "checkpoint.safetensors"  # version 0.1 kept a run's state there


def server_app(config: str | Path, callbacks: Sequence[Any] = ()) -> ServerApp:
    """A ``ServerApp`` that runs the federation of a TOML file into the folder ``out`` of the run's configuration.

    Where that folder holds the beginning of this run, it resumes after the last finished round. ``callbacks`` are
    called on the server.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        out = Path(str(context.run_config["out"])).expanduser()
        resolved = read(config)
        run_server(resolved, grid, out, Lines(resolved.rounds).watch, callbacks)

    return app


def run_server(
    config: Config, grid: Grid, out: Path, watch: Watch = lambda event: None, callbacks: Sequence[Any] = ()
) -> Result:
    """Runs a federation's rounds over a grid into ``out`` as ``fedlora run`` would, with a checkpoint a round.

    ``ConfigError`` where ``out`` holds another run, or this one finished, or somebody else is at work there; it stays
    as it was.
    """

    def drive(config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take) -> None:
        engine = select_loop(config.flower)
        take(engine(watch, observe, federation=f, network=config.flower, token=_load_token(out), grid=grid), f)

    if (out / OLD).exists():
        raise ConfigError(
            f"{str(out)!r} holds a run of an earlier version of fedlora; finish it with that version, or choose "
            "another folder."
        )
    return run(config, out, watch, drive=drive, again=(out / TOKEN).exists(), callbacks=callbacks)


def _load_token(out: Path) -> str:
    """The run's own name, made where there is none. Clients keep their state under it, so a resumed run keeps it."""
    path = out / TOKEN
    if path.exists():
        return str(read_json(path)["run"])
    token = uuid4().hex
    save_json(path, {"run": token})
    return token
