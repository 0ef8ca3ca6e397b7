"""Federated low-rank adaptation of pretrained transformers: one base model, many parties, no shared data.

``fedlora.read`` and ``fedlora.run`` are all that a script needs. Names are loaded when they are first used, so that
``import fedlora`` and ``fedlora --help`` stay quick.
"""

import importlib
from typing import Any

_WHERE = {
    "Callback": "fedlora.runs.callbacks", "CallbackError": "fedlora.runs.callbacks",
    "Config": "fedlora.runs.config", "ConfigError": "fedlora.schema",
    "MultiHead": "fedlora.adapters", "LoRA": "fedlora.adapters", "VeRA": "fedlora.adapters",
    "Method": "fedlora.methods._base", "Model": "fedlora.training.model",
    "Registry": "fedlora.registry",
    "Result": "fedlora.runs.run", "build": "fedlora.runs.config", "compare": "fedlora.runs.compare",
    "read": "fedlora.runs.config", "resume": "fedlora.runs.resume", "run": "fedlora.runs.run",
    "RoundError": "fedlora.engines.server", "Server": "fedlora.engines.server",
}  # fmt: skip

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # reading it takes longer than all else here
        return importlib.import_module("importlib.metadata").version("fedlora")
    if name == "methods":
        return importlib.import_module("fedlora.methods")
    if name not in _WHERE:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
