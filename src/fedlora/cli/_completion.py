"""What the shell offers when Tab is pressed; nothing heavy is imported."""

from fedlora.registry import Registry

SPECIAL = ["centralised"]  # what compare takes besides methods


def names() -> list[str]:
    """All methods. ``METHODS`` has the same names, but importing it imports torch."""
    return Registry(object, "method", group="fedlora.methods", package="fedlora.methods").names()


def method(incomplete: str) -> list[str]:
    """Methods that begin so."""
    return [name for name in names() if name.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    """The same of the last of several with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [f"{before}{comma}{n}" for n in [*names(), *SPECIAL] if n.startswith(last) and n not in taken]


def override(incomplete: str) -> list[str]:
    """``method.name=`` and its methods."""
    key, equals, value = incomplete.partition("=")
    if key == "method.name" and equals:
        return [f"{key}={name}" for name in method(value)]
    return ["method.name="] if "method.name=".startswith(incomplete) else []
