"""Kinds of problem, one a file; the file's name is the task's name."""

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

_NOT_TASKS = {"task", "data", "networks"}


def names() -> list[str]:
    """The names of all tasks, found by looking in this folder."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_TASKS)


def load(name: str) -> type[Any]:
    """The task's class. ``ValueError`` names the nearest one."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no task {name!r}{hint} The tasks are {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__)
