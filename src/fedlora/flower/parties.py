"""A party made of a configuration: the same for a simulation's many clients and for one organisation's node."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp

from fedlora.config import build
from fedlora.engines.flower.node import Base, Node
from fedlora.engines.flower.party import client_app
from fedlora.engines.flower.store import Store
from fedlora.settings import ConfigError

CLIENT = ("client", "partition-id")  # keys of a node's configuration that say which client it is


@lru_cache(maxsize=1)
def base(table: str, party: int | None = None) -> Base:
    """The process's one model and data; they are loaded when the first message comes, and stay."""
    return Base(build(json.loads(table)).federation(party))


def number(node_config: Mapping[str, Any]) -> int:
    """Which client a node is. ``ConfigError`` where it does not say so."""
    found = next((node_config[key] for key in CLIENT if key in node_config), None)
    if not isinstance(found, int):
        raise ConfigError(f"the node's configuration says client = {found!r}; start the node with its number, from 0.")
    return found


def simulated_app(table: Mapping[str, Any], folder: Path) -> ClientApp:
    """All clients of a federation in one folder, whichever process they run in."""
    text = json.dumps(table)

    def node(context: Context, run: str) -> Node:
        return Node(base(text), number(context.node_config), Store(folder / run))

    return client_app(node)
