"""The configuration of a node: which client it is, and where it keeps its state.

Read in the process that Flower starts for every message, so nothing heavy is imported here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.schema import ConfigError

CLIENT = ("client", "partition-id")  # keys of a node's configuration that say which client it is
HERE = ("state", "host", "num-partitions")  # other keys of ours, or Flower's, that are no settings


def number(node_config: Mapping[str, Any]) -> int:
    """Which client a node is. ``ConfigError`` where it does not say so."""
    found = next((node_config[key] for key in CLIENT if key in node_config), None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ConfigError(f"the node's configuration says client = {found!r}; start the node with its number, from 0.")
    return found


def state_folder(node_config: Mapping[str, Any]) -> Path:
    """Where a party keeps what is its own: ``state`` of its node's configuration, or a folder in its home."""
    if "state" in node_config:
        return Path(str(node_config["state"])).expanduser()
    home = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser()
    return home / "fedlora" / f"client-{number(node_config)}"
