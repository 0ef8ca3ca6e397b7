"""Attacks, one a file, named by the file. They are found in this folder; there is no list."""

from fedlora import registry as finding
from fedlora.security.attacks._base import Attack


def names() -> list[str]:
    """The names of all attacks."""
    return finding.names(__path__)


def load(name: str) -> type[Attack]:
    """Loads an attack's class by its name. ``ValueError`` names the nearest one."""
    return finding.load(__name__, name, names(), Attack, "attack")
