"""Federated methods, one paper a file. The file's name is the method's name."""

from fedlora.methods._base import Method
from fedlora.registry import Registry, name_or_nearest

METHODS = Registry(Method, "method", group="fedlora.methods", package=__name__)
names, load = METHODS.names, METHODS.load


def merging_methods() -> dict[str, type[Method]]:
    """Return the methods that can merge finished LoRAs, by name."""
    return {name: kind for name, kind in METHODS.classes().items() if kind.merge_obstacle() is None}


def load_merging_method(name: str) -> type[Method]:
    """Return the class of a method that can merge finished LoRAs. Raises ``ValueError`` if this one cannot."""
    near, subject = name_or_nearest("method", name, [*([name] if ":" in name else []), *METHODS.names()])
    if near is not None and (why := METHODS.load(near).merge_obstacle()):
        able = ", ".join(merging_methods())
        raise ValueError(f"{subject} cannot be applied to finished adapters: {why}; take one of {able}.")
    return METHODS.load(name)
