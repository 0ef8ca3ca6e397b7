"""One codec a file; the file's name is the codec's name. Found by looking in this folder, never listed."""

import importlib
import inspect
import pkgutil

from fedlora.codec import Codec
from fedlora.nearest import unknown


def names() -> list[str]:
    """The names of all codecs."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> type[Codec]:
    """The codec's class. ``ValueError`` names the nearest one."""
    if name not in names():
        raise ValueError(unknown("codec", name, ["float32", *names()], "codecs"))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    found = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    if len(found) != 1:
        raise ValueError(f"{module.__name__} defines {len(found)} codecs; a codec's file defines exactly one.")
    return found[0]
