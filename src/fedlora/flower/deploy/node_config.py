"""A node's own configuration: its client number, its state folder, and the settings of its machine alone.

It is read in the process that Flower starts for each message, so heavy imports are inside functions.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.registry import unknown
from fedlora.schema import ConfigError, Table

CLIENT = ("client", "partition-id")  # keys for the client number
OTHER = ("state", "host", "num-partitions")  # other keys of ours or Flower's that are no settings


def read_client(node_config: Mapping[str, Any]) -> int:
    """Return the number of a node's client. Raises ``ConfigError`` if the configuration has none."""
    client = next((node_config[key] for key in CLIENT if key in node_config), None)
    if not isinstance(client, int) or isinstance(client, bool) or client < 0:
        raise ConfigError(f"the node's configuration says client = {client!r}; start the node with its number, from 0.")
    return client


def apply_node_config(table: Table, node_config: Mapping[str, Any]) -> Table:
    """Return the federation's configuration with the settings of a node's own machine.

    Raises ``ConfigError`` if the node sets anything that must be equal for all clients.
    """
    from fedlora.runs.build import per_machine_settings

    allowed = per_machine_settings(table)
    for key, value in node_config.items():
        if key in (*CLIENT, *OTHER):
            continue
        if key not in allowed:
            raise ConfigError(unknown("setting", key, allowed, "settings that a node may have of its own"))
        columns = [column.strip() for column in value.split(",")] if key == "task.text" else []
        section, _, name = key.partition(".")
        table = {**table, section: {**table.get(section, {}), name: columns if len(columns) > 1 else value}}
    return table


def state_folder(node_config: Mapping[str, Any]) -> Path:
    """Return the folder of a client's state: ``state`` of its node's configuration, or a folder in the user's home."""
    if "state" in node_config:
        return Path(str(node_config["state"])).expanduser()
    home = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser()
    return home / "fedlora" / f"client-{read_client(node_config)}"
