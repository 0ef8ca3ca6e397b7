"""One paper a file; the file's name is the method's name. Found by looking in this folder, never listed."""

import importlib
import inspect
import sys
from functools import cache
from importlib.metadata import EntryPoints, entry_points

from fedlora import registry as finding
from fedlora.methods._base import Method

GROUP = "fedlora.methods"  # entry points of packages that bring methods of their own


def names() -> list[str]:
    """The names of all methods: the files here, and the entry points of installed packages."""
    return sorted({*finding.names(__path__), *(point.name for point in _brought(tuple(sys.path)))})


def load(name: str) -> type[Method]:
    """The method's class by its name, or by ``package.module:Class``. ``ValueError`` names the nearest one."""
    if ":" in name:
        return _from_path(name)
    for point in _brought(tuple(sys.path)):
        if point.name == name:
            return point.load()
    return finding.load(__name__, name, names(), Method, "method")


def for_finished_adapters() -> list[str]:
    """The names of the methods that combine finished LoRAs."""
    return [name for name in names() if load(name).why_not_finished() is None]


def load_for_finished_adapters(name: str) -> type[Method]:
    """The class of a method that combines finished LoRAs. ``ValueError`` where this one cannot."""
    near, subject = finding.name_or_nearest("method", name, [*([name] if ":" in name else []), *names()])
    if near is not None and (why := load(near).why_not_finished()):
        able = ", ".join(for_finished_adapters())
        raise ValueError(f"{subject} cannot be applied to finished adapters: {why}; take one of {able}.")
    return load(name)


@cache
def _brought(path: tuple[str, ...]) -> EntryPoints:
    """What installed packages bring; remembered, for it takes a look into every package on the ``path``."""
    return entry_points(group=GROUP)


def _from_path(path: str) -> type[Method]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the method {path!r} could not be loaded: {error}.") from error
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise ValueError(f"{path!r} is not a fedlora.Method; name a class that extends it.")
    return found
