"""For projects that have Flower and PEFT already: a strategy for the server, and two calls for the client.

Names are loaded when they are first used: a ServerApp does not need PEFT.
"""

import importlib
from typing import Any

_WHERE = {
    "FedLoRA": "fedlora.flower.strategy",
    "receive": "fedlora.flower.client", "send": "fedlora.flower.client", "load": "fedlora.flower.client",
}  # fmt: skip

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedlora.flower' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
