"""A node's own configuration: which client it is, its state folder, and the settings of its machine alone.

Read in the process that Flower starts for every message, so nothing heavy is imported here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.registry import unknown
from fedlora.schema import ConfigError, Table

CLIENT = ("client", "partition-id")  # keys of a node's configuration that say which client it is
HERE = ("state", "host", "num-partitions")  # other keys of ours, or Flower's, that are no settings


def read_client(node_config: Mapping[str, Any]) -> int:
    """The number of a node's client. ``ConfigError`` where it does not say so."""
    found = next((node_config[key] for key in CLIENT if key in node_config), None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ConfigError(f"the node's configuration says client = {found!r}; start the node with its number, from 0.")
    return found


def apply_node_config(table: Table, node_config: Mapping[str, Any]) -> Table:
    """The federation's configuration with the settings of a node's own machine.

    ``ConfigError`` where the node sets anything that all clients must have alike.
    """
    from fedlora.runs.build import per_machine_settings

    allowed = per_machine_settings(table)
    for key, value in node_config.items():
        if key in (*CLIENT, *HERE):
            continue
        if key not in allowed:
            raise ConfigError(unknown("setting", key, allowed, "settings that a node may have of its own"))
        pair = [part.strip() for part in value.split(",")] if key == "task.text" else value
        several = isinstance(pair, list) and len(pair) > 1
        section, _, name = key.partition(".")
        table = _set(table, section, name, pair if several else value)
    return table


def _set(table: Table, section: str, name: str, value: Any) -> Table:
    return {**table, section: {**table.get(section, {}), name: value}}


def state_folder(node_config: Mapping[str, Any]) -> Path:
    """The folder of a client's own state: ``state`` of its node's configuration, or a folder in its home."""
    if "state" in node_config:
        return Path(str(node_config["state"])).expanduser()
    home = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser()
    return home / "fedlora" / f"client-{read_client(node_config)}"
