"""What a node's own configuration says: which client it is, and what belongs to its machine alone.

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
OWN = (  # settings of the configuration that belong to a party's own machine
    "task.data", "task.data_config", "task.encoding", "task.delimiter", "task.text", "task.prompt",
    "task.response", "task.messages", "task.label", "task.image", "task.train_split", "task.test_split",
    "model.name", "model.same_base", "engine.device", "engine.threads", "engine.allocator",
)  # fmt: skip


def number(node_config: Mapping[str, Any]) -> int:
    """Which client a node is. ``ConfigError`` where it does not say so."""
    found = next((node_config[key] for key in CLIENT if key in node_config), None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ConfigError(f"the node's configuration says client = {found!r}; start the node with its number, from 0.")
    return found


def own_table(table: Table, node_config: Mapping[str, Any]) -> Table:
    """The federation's configuration with what this party's node says of its own machine.

    ``ConfigError`` where the node sets anything that all parties must have alike.
    """
    for key, value in node_config.items():
        if key in (*CLIENT, *HERE):
            continue
        if key not in OWN:
            raise ConfigError(unknown("setting", key, OWN, "settings that a node may have of its own"))
        pair = [part.strip() for part in value.split(",")] if key == "task.text" else value
        several = isinstance(pair, list) and len(pair) > 1
        section, _, name = key.partition(".")
        table = _set(table, section, name, pair if several else value)
    return table


def _set(table: Table, section: str, name: str, value: Any) -> Table:
    return {**table, section: {**table.get(section, {}), name: value}}


def state_folder(node_config: Mapping[str, Any]) -> Path:
    """Where a party keeps what is its own: ``state`` of its node's configuration, or a folder in its home."""
    if "state" in node_config:
        return Path(str(node_config["state"])).expanduser()
    home = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser()
    return home / "fedlora" / f"client-{number(node_config)}"
