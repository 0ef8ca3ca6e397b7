"""One attack a file; the file's name is the attack's name. Found by looking in this folder, never listed."""

from fedlora import registry as finding
from fedlora.security.attacks._base import Attack


def names() -> list[str]:
    """The names of all attacks."""
    return finding.names(__path__)


def load(name: str) -> type[Attack]:
    """The attack's class by its name. ``ValueError`` names the nearest one."""
    return finding.load(__name__, name, names(), Attack, "attack")
