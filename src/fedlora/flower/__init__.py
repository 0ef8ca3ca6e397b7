"""Federations over Flower's messages.

The modules here are the engine: a server that is a Flower strategy, and clients that answer its messages. ``deploy``
has the processes and certificates of a deployment, and ``strategy`` a strategy for existing Flower apps that use PEFT.

Names are loaded on first use: the process of a client app lives for one message and does not import torch, and a server
app does not need PEFT.
"""

import importlib
import os
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_MODULES = {
    "client_app": "deploy.client_process", "server_app": "serve", "FedLoRA": "strategy.strategy",
    "receive": "strategy.client", "send": "strategy.client", "load": "strategy.client",
}  # fmt: skip

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fedlora.flower' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedlora.flower.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
