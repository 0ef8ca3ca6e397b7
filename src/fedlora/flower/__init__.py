"""Federations over Flower's messages.

The modules here are the engine: a server that is a Flower strategy, and clients that answer its messages. ``deploy``
has the processes and certificates of a deployment, ``strategy`` a strategy for Flower and PEFT apps that are there
already.

Names are loaded when they are first used: a client app's process lives for one message, and imports no torch, and a
server app needs no PEFT.
"""

import importlib
import os
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # nothing is reported to anybody
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_WHERE = {
    "client_app": "fedlora.flower.deploy.client_process", "server_app": "fedlora.flower.serve",
    "FedLoRA": "fedlora.flower.strategy.strategy", "receive": "fedlora.flower.strategy.client",
    "send": "fedlora.flower.strategy.client", "load": "fedlora.flower.strategy.client",
}  # fmt: skip

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedlora.flower' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
