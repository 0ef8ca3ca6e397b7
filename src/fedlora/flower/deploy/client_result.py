"""A client's model after a run, as a run's folder on its own machine: to show, and to export from."""

from pathlib import Path
from typing import Any

from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.federation import Federation
from fedlora.files import check_new_folder
from fedlora.flower.client_store import ClientStore, StoredState
from fedlora.flower.wire import overlay
from fedlora.runs.config import Config, ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.runs.summary import describe_labels, summarise
from fedlora.tasks.data.labels import READINGS


def write_result(
    config: Config, state: str | Path, client: int, out: str | Path, run: str | None = None
) -> dict[str, Any]:
    """Writes the folder of the last run (or of ``run``) in a client's ``state`` folder; returns its summary.

    ``config`` is the federation's, with this machine's own settings. ``ConfigError`` where the client has no state.
    """
    folder = check_new_folder(out)
    if not 0 <= client < config.clients.members:
        raise ConfigError(
            f"there is no client {client}; the federation has the clients 0 to {config.clients.members - 1}."
        )
    store = _open_store(Path(state).expanduser(), client, run)
    held = store.load(client)
    f = config.federation(combines=True)
    shared = overlay(f.model.initial(f.seed), held.leaves)
    base_updates = _load_base_updates(store, held)
    summary = {
        **summarise(config, [], False, 0.0), **describe_labels(f, _reading(store, client, f)), "kept": True,
        "base_updates": len(base_updates),
        "rounds": held.counted + 1, "client": client,
    }  # fmt: skip
    place = RunFolder(folder)
    place.write_config(config.table)
    place.write_records([])
    place.write_result(shared, {client: held.resolve_pending(held.counted).kept}, base_updates, summary)
    return summary


def _open_store(state: Path, client: int, run: str | None) -> ClientStore:
    """The state of the named run, or of the one that was written last."""
    files = sorted(state.glob(f"{run or '*'}/clients/{client}.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(
            f"{str(state)!r} has no state of client {client}{f' in the run {run!r}' if run else ''}; "
            "name the folder that the node's configuration calls state."
        )
    return ClientStore(files[-1].parents[1])


def _reading(store: ClientStore, client: int, f: Federation) -> dict[int, str]:
    """How the client's own rows were read, by its state; empty where all clients have rows of one data set."""
    reading = (store.load_rows(client) or {}).get("reading") if f.data is None else None
    return {client: reading} if reading in READINGS and reading else {}


def _load_base_updates(store: ClientStore, held: StoredState) -> BaseUpdateLog:
    log = BaseUpdateLog()
    for name in held.base_updates:
        log.append(store.load_base_update(name))
    return log
