"""A party made of a configuration: the same for a simulation's many clients and for one organisation's node."""

import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from fedlora.flower.client import Base, Node
from fedlora.flower.client_messages import client_app, handled, prepend_client
from fedlora.flower.client_store import Store
from fedlora.flower.deploy.node_config import CLIENT, HERE, number, state_folder
from fedlora.registry import unknown
from fedlora.runs.build import per_machine_settings
from fedlora.runs.config import build
from fedlora.schema import ConfigError, Table


@lru_cache(maxsize=1)
def base(table: str, party: int | None = None) -> Base:
    """The process's one model and data; they are loaded when the first message comes, and stay."""
    federation = build(json.loads(table)).federation(party)
    for note in federation.notes if party is not None else ():  # of a party's own rows; else the run says it
        print(f"fedlora: {note}", file=sys.stderr, flush=True)
    return Base(federation)


def party(table: Table, node_config: Mapping[str, Any], run: str) -> Node:
    """One organisation's party for a run, with its own data; model and data are loaded once a process."""
    client = number(node_config)
    own = own_table(table, node_config)
    return Node(base(json.dumps(own), client), client, Store(state_folder(node_config) / run), build(own).flower)


def own_table(table: Table, node_config: Mapping[str, Any]) -> Table:
    """The federation's configuration with what this party's node says of its own machine.

    ``ConfigError`` where the node sets anything that all parties must have alike.
    """
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


def simulated_app(table: Table, folder: Path) -> ClientApp:
    """All clients of a federation in one folder, whichever process they run in."""
    text, network = json.dumps(table), build(table).flower

    def turns(kind, content, context):
        node = context.node_config
        found = handled(kind, content, lambda run: Node(base(text), number(node), Store(folder / run), network))
        return prepend_client(kind, found, lambda: number(node))

    return client_app(turns)
