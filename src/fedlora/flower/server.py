"""The server app of a configuration: runs it over Flower, keeps it in a folder, and goes on from there when asked."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import Config, ConfigError, read
from fedlora.engines.checkpoint import Checkpoint, config_digest
from fedlora.engines.federation import Federation
from fedlora.engines.flower.masked import served_by
from fedlora.engines.loop import Observe, Round, Watch
from fedlora.report.progress import Lines
from fedlora.runs import Result, Take, run
from fedlora.state import save_json

TOKEN = "run.json"


def server_app(config: str | Path) -> ServerApp:
    """A ``ServerApp`` that runs the federation of a TOML file into the folder ``out`` of the run's configuration.

    Where that folder holds the beginning of this run, it goes on from the last finished round.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        out = Path(str(context.run_config["out"])).expanduser()
        resolved = read(config)
        serve(resolved, grid, out, Lines(resolved.rounds).watch)

    return app


def serve(config: Config, grid: Grid, out: Path, watch: Watch = lambda event: None) -> Result:
    """The federation's rounds over a grid, kept in ``out`` as ``fedlora run`` would, with a checkpoint a round.

    ``ConfigError`` where ``out`` holds another run, or this one finished, or somebody else is at work there; it stays
    as it was.
    """

    def drive(config: Config, f: Federation, watch: Watch, observe: Observe | None, take: Take) -> None:
        checkpoint = Checkpoint(out, digest, _token(out))
        engine = served_by(config.flower)(
            watch, observe, federation=f, network=config.flower, token=checkpoint.token, grid=grid
        )
        at = checkpoint.load(f, engine.begin(f)) if checkpoint else None
        take(_saved(engine.run(f, at), checkpoint))

    digest = config_digest(config.table)
    with _alone(out):
        again = (out / TOKEN).exists()
        checkpoint = Checkpoint(out, digest, _token(out) if again else "")
        if checkpoint and checkpoint.about()["number"] >= config.rounds:
            raise ConfigError(f"{str(out)!r} holds this run, finished; raise rounds, or choose another folder.")
        return run(config, out, watch, drive=drive, again=again)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While nobody else runs into this folder; the system takes the lock back when a process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        place = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot write to {str(out)!r}: {error.strerror}; choose another folder.") from error
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(place)
        raise ConfigError(f"another run writes into {str(out)!r}; stop it, or choose another folder.") from error
    try:
        yield
    finally:
        os.close(place)


def _saved(rounds: Iterator[Round], checkpoint: Checkpoint) -> Iterator[Round]:
    """Each round's state is on disk, after its record, before the next round begins."""
    for done in rounds:
        try:
            yield done
        finally:
            checkpoint.save(done.standing)


def _token(out: Path) -> str:
    """The run's own name: parties keep their state under it, so a folder that is gone on with keeps its own."""
    path = out / TOKEN
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    token = uuid4().hex
    save_json(path, {"run": token})
    return token
