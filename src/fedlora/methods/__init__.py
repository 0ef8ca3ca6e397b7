"""One paper a file; the file's name is the method's name. Found by looking in this folder, never listed."""

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points

from fedlora.method import Method
from fedlora.nearest import unknown

GROUP = "fedlora.methods"  # entry points of packages that bring methods of their own


def names() -> list[str]:
    """The names of all methods: the files here, and the entry points of installed packages."""
    here = {module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)}
    return sorted(here | {point.name for point in entry_points(group=GROUP)})


def load(name: str) -> type[Method]:
    """The method's class by its name, or by ``package.module:Class``. ``ValueError`` names the nearest one."""
    if ":" in name:
        return _from_path(name)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return point.load()
    if name not in names():
        raise ValueError(unknown("method", name, names(), "methods"))
    return _only_class(importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def _from_path(path: str) -> type[Method]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the method {path!r} could not be loaded: {error}.") from error
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise ValueError(f"{path!r} is not a fedlora.Method; name a class that extends it.")
    return found


def _only_class(module) -> type[Method]:
    """The one ``Method`` that a file defines."""
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, Method)]
    if len(found) != 1:
        raise ValueError(f"{module.__name__} defines {len(found)} methods; a method's file defines exactly one.")
    return found[0]
