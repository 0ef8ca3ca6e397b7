"""Completions of the shell, without any heavy import."""

from fedlora.registry import Registry


def list_method_names() -> list[str]:
    """List all methods. ``METHODS`` has the same names, but importing it imports torch."""
    return Registry(object, "method", group="fedlora.methods", package="fedlora.methods").names()


def complete_method(incomplete: str) -> list[str]:
    """Complete the name of a method."""
    return [name for name in list_method_names() if name.startswith(incomplete)]


def complete_methods(incomplete: str) -> list[str]:
    """Complete the last of several methods that are separated by commas, or ``centralised``."""
    before, comma, last = incomplete.rpartition(",")
    names = [*list_method_names(), "centralised"]
    return [f"{before}{comma}{name}" for name in names if name.startswith(last) and name not in before.split(",")]


def complete_override(incomplete: str) -> list[str]:
    """Complete ``method.name=`` and the method behind it."""
    key, equals, value = incomplete.partition("=")
    if key == "method.name" and equals:
        return [f"{key}={name}" for name in complete_method(value)]
    return ["method.name="] if "method.name=".startswith(incomplete) else []
