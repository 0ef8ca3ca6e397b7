"""Kinds of problem, one a file; the file's name is the task's name."""

import importlib
import inspect
from typing import Any

from fedlora import registry as finding
from fedlora.registry import unknown


def names() -> list[str]:
    """The names of all tasks, found by looking in this folder."""
    return finding.names(__path__)


def load(name: str) -> type[Any]:
    """The task's class. ``ValueError`` names the nearest one."""
    if name not in names():
        raise ValueError(unknown("task", name, names(), "tasks"))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__)
