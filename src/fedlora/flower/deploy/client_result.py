"""A client's model after a run, as a run's folder on the client's machine."""

from pathlib import Path
from typing import Any

from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.files import check_new_folder
from fedlora.flower.client_store import ClientStore
from fedlora.flower.wire import overlay
from fedlora.runs.config import Config
from fedlora.runs.folder import RunFolder
from fedlora.runs.summary import describe_labels, summarise
from fedlora.schema import ConfigError
from fedlora.tasks.data.labels import READINGS


def write_result(
    config: Config, state: str | Path, client: int, out: str | Path, run: str | None = None
) -> dict[str, Any]:
    """Write the folder of a client's last run (or of ``run``) from its ``state`` folder, and return its summary.

    ``config`` is the federation's, with this machine's own settings. Raises ``ConfigError`` if the client has no state.
    """
    folder, state = check_new_folder(out), Path(state).expanduser()
    if not 0 <= client < config.clients.members:
        raise ConfigError(
            f"there is no client {client}; the federation has the clients 0 to {config.clients.members - 1}."
        )
    files = sorted(state.glob(f"{run or '*'}/clients/{client}.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(
            f"{str(state)!r} has no state of client {client}{f' in the run {run!r}' if run else ''}; "
            "name the folder that the node's configuration calls state."
        )
    store = ClientStore(files[-1].parents[1])
    stored = store.load(client)
    f = config.federation(combines=True)
    base_updates = BaseUpdateLog(entries=[store.load_base_update(name) for name in stored.base_updates])
    # Only a client with its own data has a label reading of its own.
    reading = (store.load_rows(client) or {}).get("reading") if f.data is None else None
    readings = {client: reading} if reading in READINGS and reading else {}
    summary = {
        **summarise(config, [], False, 0.0), **describe_labels(f, readings), "kept": True,
        "base_updates": len(base_updates), "rounds": stored.counted + 1, "client": client,
    }  # fmt: skip
    result = RunFolder(folder)
    result.write_config(config.table)
    result.write_records([])
    kept = stored.resolve_pending(stored.counted).kept
    result.write_result(overlay(f.model.initial(f.seed), stored.leaves), {client: kept}, base_updates, summary)
    return summary
