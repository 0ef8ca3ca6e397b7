"""What the shell offers when Tab is pressed; nothing heavy is imported."""

from importlib.util import find_spec

from fedlora import registry

SPECIAL = ["centralised"]  # what compare takes besides methods


def names() -> list[str]:
    """All methods, by their files' names and by the entry points of other packages."""
    from importlib.metadata import entry_points

    place = find_spec("fedlora").submodule_search_locations[0]
    return sorted({*registry.names([f"{place}/methods"]), *(p.name for p in entry_points(group="fedlora.methods"))})


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
