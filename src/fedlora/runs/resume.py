"""Resume a run that was interrupted, or extend a finished one; the result has the bits of an uninterrupted run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.engines.checkpoint import is_extendable
from fedlora.engines.loop import Watch
from fedlora.engines.record import RoundRecord
from fedlora.runs.config import Config, Overrides, read, to_config, to_table
from fedlora.runs.file_names import CONFIG, TOKEN
from fedlora.runs.folder import RunFolder
from fedlora.runs.objects import Objects, attach_code
from fedlora.runs.run import Result, run_config
from fedlora.schema import ConfigError


def resume_folder(
    path: str | Path,
    rounds: int | None = None,
    overrides: Overrides = (),
    watch: Watch = lambda event: None,
    callbacks: Sequence[Any] = (),
    objects: Objects | None = None,
) -> Result:
    """Resume the run in a folder; see ``fedlora.resume``. A run on Python objects needs the same ``objects`` again."""
    config = read_resumable(path, rounds, overrides)
    if objects is not None:
        config = attach_code(config, objects.code())
    return run_config(config, Path(path).expanduser(), watch, again=True, callbacks=callbacks)


def read_resumable(path: str | Path, rounds: int | None = None, overrides: Overrides = ()) -> Config:
    """Read the configuration of a folder's run. Raises ``ConfigError`` if the run cannot be resumed."""
    folder = Path(path).expanduser()
    places = ("*-seed*", "trials/*-seed*")  # of a comparison and of a sweep
    runs = sorted(file.parent for place in places for file in folder.glob(f"{place}/{CONFIG}"))
    if not (folder / CONFIG).exists() and runs:
        raise ConfigError(
            f"{str(folder)!r} is not a run; it contains {len(runs)} runs, such as {str(runs[0])!r}. To continue them, "
            f"repeat the command that started them (fedlora compare, demo or sweep) with --out {folder}."
        )
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{str(folder)!r} holds no run: it has no {CONFIG}; name a folder `fedlora run` made.")
    if (folder / TOKEN).exists():
        raise ConfigError(
            f"{str(folder)!r} holds a run whose clients keep their state on their own machines; go on with it by "
            "`flwr run` with the same app and out, or, where that began it, by "
            f"`fedlora flower local {folder / CONFIG} --out {folder}`."
        )
    config = to_config(to_table(folder / CONFIG, overrides), {} if rounds is None else {"rounds": rounds})
    _check_rounds(folder, read(folder / CONFIG), config, RunFolder(folder).records)
    return config


def _check_rounds(folder: Path, before: Config, config: Config, done: list[RoundRecord]) -> None:
    if config.rounds != before.rounds and not is_extendable(config.table):
        raise ConfigError(
            f"training.schedule = {config.training.schedule!r} with warmup = {config.training.warmup} is over all "
            f"{before.rounds} rounds of {str(folder)!r}, so it cannot be run for {config.rounds}; leave --rounds out."
        )
    if config.rounds < len(done):
        raise ConfigError(f"{str(folder)!r} holds {len(done)} rounds already; name more than these with --rounds.")
    if RunFolder(folder).is_finished(config.rounds):
        raise ConfigError(
            f"{str(folder)!r} holds a finished run of {len(done)} rounds; `fedlora resume {folder} --rounds "
            f"{2 * len(done)}` would make it longer."
        )
    if any("oracle" in record for record in done):
        raise ConfigError(f"{str(folder)!r} is of `fedlora compare --oracle`, which cannot go on; run it anew.")
