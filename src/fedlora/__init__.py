"""Federated low-rank adaptation of pretrained transformers: one base model, many parties, no shared data.

``fedlora.run("mine.toml")`` is all that a script needs. Names are loaded when they are first used, so that
``import fedlora`` and ``fedlora --help`` stay quick.
"""

import importlib
from typing import Any

_WHERE = {
    "aggregate": "fedlora.api", "attach": "fedlora.training.open_model", "federate": "fedlora.api",
    "ClientInfo": "fedlora.engines.trainers", "Session": "fedlora.runs.session",
    "compare": "fedlora.api", "open": "fedlora.api", "plan": "fedlora.api",
    "read": "fedlora.runs.config", "resume": "fedlora.api", "run": "fedlora.api", "sweep": "fedlora.api",
    "Config": "fedlora.runs.config", "ConfigError": "fedlora.schema", "build": "fedlora.runs.config",
    "CheckpointSettings": "fedlora.engines.checkpoint", "Clients": "fedlora.engines.clients",
    "Compression": "fedlora.engines.comm.compression", "Engine": "fedlora.training.device",
    "Evaluation": "fedlora.training.evaluation", "ModelTable": "fedlora.runs.sections",
    "Network": "fedlora.engines.network_settings", "Privacy": "fedlora.security.privacy",
    "ServerOptimizer": "fedlora.engines.server_optimizer", "Track": "fedlora.runs.trackers",
    "Training": "fedlora.training.local", "Validation": "fedlora.security.validation",
    "DualLoRA": "fedlora.adapters", "LoRA": "fedlora.adapters", "LoRASB": "fedlora.adapters",
    "MultiHead": "fedlora.adapters", "VeRA": "fedlora.adapters",
    "Callback": "fedlora.runs.callbacks", "CallbackError": "fedlora.runs.callbacks",
    "Method": "fedlora.methods._base", "Model": "fedlora.training.model", "Registry": "fedlora.registry",
    "Objects": "fedlora.runs.objects", "RunResult": "fedlora.api", "Result": "fedlora.runs.run",
    "load_update": "fedlora.export.update", "RoundError": "fedlora.engines.server",
    "Server": "fedlora.engines.server",
}  # fmt: skip
_MODULES = {  # each has ``names()`` and ``load(name)``
    "adapters": "fedlora.adapters", "attacks": "fedlora.security.attacks", "methods": "fedlora.methods",
    "partitioners": "fedlora.engines.partition", "robust": "fedlora.security.robust", "tasks": "fedlora.tasks",
    "trackers": "fedlora.runs.trackers",
}  # fmt: skip

__all__ = [*_WHERE, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # reading it takes longer than all else here
        return importlib.import_module("importlib.metadata").version("fedlora")
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _WHERE:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
