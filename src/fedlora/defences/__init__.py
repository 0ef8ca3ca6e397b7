"""One robust rule a file; the file's name is the rule's name. Found by looking in this folder, never listed."""

import importlib
import inspect
import pkgutil

from fedlora.defence import Defence
from fedlora.nearest import unknown


def names() -> list[str]:
    """The names of all rules."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> type[Defence]:
    """The rule's class by its name. ``ValueError`` names the nearest one."""
    if name not in names():
        raise ValueError(unknown("robust rule", name, names(), "robust rules"))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(
        kind for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Defence) and kind.__module__ == module.__name__
    )  # fmt: skip
