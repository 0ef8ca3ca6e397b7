"""A party made of a configuration: the same for a simulation's many clients and for one organisation's node."""

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from fedlora.config import build
from fedlora.engines.flower.node import Base, Node
from fedlora.engines.flower.party import client_app, handled
from fedlora.engines.flower.store import Store
from fedlora.nearest import unknown
from fedlora.settings import ConfigError, Table

CLIENT = ("client", "partition-id")  # keys of a node's configuration that say which client it is
HERE = ("state", "host", "num-partitions")  # other keys of ours, or Flower's, that are no settings
OWN = (  # settings of the configuration that belong to a party's own machine
    "task.data", "task.data_config", "task.text", "task.label", "task.image", "task.train_split", "task.test_split",
    "model.name", "engine.device", "engine.threads", "engine.allocator",
)  # fmt: skip


@lru_cache(maxsize=1)
def base(table: str, party: int | None = None) -> Base:
    """The process's one model and data; they are loaded when the first message comes, and stay."""
    return Base(build(json.loads(table)).federation(party))


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


def party(table: Table, node_config: Mapping[str, Any], run: str) -> Node:
    """One organisation's party for a run, with its own data; model and data are loaded once a process."""
    client = number(node_config)
    own = base(json.dumps(own_table(table, node_config)), client)
    return Node(own, client, Store(state_folder(node_config) / run))


def simulated_app(table: Table, folder: Path) -> ClientApp:
    """All clients of a federation in one folder, whichever process they run in."""
    text = json.dumps(table)

    def turns(kind, content, context):
        return handled(kind, content, lambda run: Node(base(text), number(context.node_config), Store(folder / run)))

    return client_app(turns)
