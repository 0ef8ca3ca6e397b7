"""What a party holds after a run, as a run's folder on its own machine: to show, and to export its own model from."""

from pathlib import Path
from typing import Any

from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.federation import Federation
from fedlora.files import absent
from fedlora.flower.client import laid_over
from fedlora.flower.client_store import Holding, Store
from fedlora.runs.config import Config, ConfigError
from fedlora.runs.data_distribution import labels
from fedlora.runs.folder import RunFolder
from fedlora.runs.run import summarise
from fedlora.tasks.data.labels import READINGS


def result(config: Config, state: str | Path, client: int, out: str | Path, run: str | None = None) -> dict[str, Any]:
    """Writes the folder of the last run (or of ``run``) that a party's ``state`` folder knows; returns its summary.

    ``config`` is the federation's, with what is this machine's own in it. ``ConfigError`` where the party has no state.
    """
    folder = absent(out)
    if not 0 <= client < config.clients.members:
        raise ConfigError(
            f"there is no client {client}; the federation has the clients 0 to {config.clients.members - 1}."
        )
    store = _store(Path(state).expanduser(), client, run)
    held = store.load(client)
    f = config.federation(combines=True)
    shared = laid_over(f.model.initial(f.seed), held.leaves)
    folds = _folds(store, held)
    summary = {
        **summarise(config, [], False, 0.0), **labels(f, _reading(store, client, f)), "folds": len(folds), "kept": True,
        "rounds": held.counted + 1, "client": client,
    }  # fmt: skip
    place = RunFolder(folder)
    place.write_config(config.table)
    place.write_records([])
    place.write_result(shared, {client: held.settled(held.counted).kept}, folds, summary)
    return summary


def _store(state: Path, client: int, run: str | None) -> Store:
    """The state of the named run, or of the one that was written last."""
    files = sorted(state.glob(f"{run or '*'}/clients/{client}.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(
            f"{str(state)!r} has no state of client {client}{f' in the run {run!r}' if run else ''}; "
            "name the folder that the node's configuration calls state."
        )
    return Store(files[-1].parents[1])


def _reading(store: Store, client: int, f: Federation) -> dict[int, str]:
    """How the party's own rows were read, as its state says; where all have the rows of one data set, those say it."""
    reading = (store.rows(client) or {}).get("reading") if f.data is None else None
    return {client: reading} if reading in READINGS and reading else {}


def _folds(store: Store, held: Holding) -> BaseUpdateLog:
    log = BaseUpdateLog()
    for name in held.folds:
        log.append(store.fold(name))
    return log
