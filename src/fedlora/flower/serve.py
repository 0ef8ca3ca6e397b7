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
from fedlora.runs.config import Config, read
from fedlora.runs.file_names import TOKEN
from fedlora.runs.folder import read_json
from fedlora.runs.progress import Lines
from fedlora.runs.run import Result, Take, run_config
from fedlora.schema import ConfigError


def server_app(config: str | Path, callbacks: Sequence[Any] = ()) -> ServerApp:
    """Return a ``ServerApp`` that runs a TOML file's federation into the folder ``out`` of the run's configuration.

    If that folder holds the beginning of this run, it is resumed after the last finished round. ``callbacks`` are
    called on the server.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        resolved = read(config)
        run_server(
            resolved, grid, Path(str(context.run_config["out"])).expanduser(), Lines(resolved.rounds).watch, callbacks
        )

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
