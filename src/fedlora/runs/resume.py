"""A run that was broken off, or is to be longer, goes on from its folder with the bits of one that never stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.engines.checkpoint import endless
from fedlora.engines.loop import Watch
from fedlora.engines.record import RoundRecord
from fedlora.runs.config import Config, ConfigError, read
from fedlora.runs.file_names import CONFIG, TOKEN
from fedlora.runs.folder import RunFolder
from fedlora.runs.run import Result, run


def resume(
    path: str | Path,
    rounds: int | None = None,
    overrides: Sequence[str] = (),
    watch: Watch = lambda event: None,
    callbacks: Sequence[Any] = (),
) -> Result:
    """Goes on with the run in a folder, to ``rounds`` or to as many as it was asked for.

    ``overrides`` are for what leaves the bits alone: ``engine.name``, ``engine.threads``, ``checkpoint.keep``, and
    ``task.data`` where the same data lies elsewhere by now. Raises
    ``ConfigError`` where the folder holds no run, a finished one, or one that cannot go on here, and ``ValueError``
    where no checkpoint is sound.
    """
    return run(continued(path, rounds, overrides), Path(path).expanduser(), watch, again=True, callbacks=callbacks)


def continued(path: str | Path, rounds: int | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a folder's run goes on with; ``ConfigError`` where it cannot."""
    folder = Path(path).expanduser()
    if not (folder / CONFIG).exists() and (runs := _runs_in(folder)):
        raise ConfigError(
            f"{str(folder)!r} is not a run; it contains {len(runs)} runs, such as {str(runs[0])!r}. To continue them, "
            f"repeat the command that started them (fedlora compare, demo or sweep) with --out {folder}."
        )
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{str(folder)!r} holds no run: it has no {CONFIG}; name a folder `fedlora run` made.")
    if (folder / TOKEN).exists():
        raise ConfigError(
            f"{str(folder)!r} holds a run whose parties keep their state on their own machines; go on with it by "
            "`flwr run` with the same app and out, or, where that began it, by "
            f"`fedlora flower local {folder / CONFIG} --out {folder}`."
        )
    config = read(folder / CONFIG, [*overrides, *([f"rounds={rounds}"] if rounds is not None else [])])
    _check_rounds(folder, read(folder / CONFIG), config, RunFolder(folder).records)
    return config


def _runs_in(folder: Path) -> list[Path]:
    """The runs of a comparison, or of a sweep."""
    places = ("*-seed*", "trials/*-seed*")
    return sorted(path.parent for place in places for path in folder.glob(f"{place}/{CONFIG}"))


def _check_rounds(folder: Path, before: Config, config: Config, done: list[RoundRecord]) -> None:
    if config.rounds != before.rounds and not endless(config.table):
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
