"""One attack a file; the file's name is the attack's name. Found by looking in this folder, never listed."""

import importlib
import inspect
import pkgutil

from fedlora.attack import Attack
from fedlora.nearest import unknown


def names() -> list[str]:
    """The names of all attacks."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> type[Attack]:
    """The attack's class by its name. ``ValueError`` names the nearest one."""
    if name not in names():
        raise ValueError(unknown("attack", name, names(), "attacks"))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(
        kind for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Attack) and kind.__module__ == module.__name__
    )  # fmt: skip
