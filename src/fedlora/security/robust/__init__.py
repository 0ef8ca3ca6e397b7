"""One robust rule a file; the file's name is the rule's name. Found by looking in this folder, never listed."""

from fedlora import registry as finding
from fedlora.security.robust._base import Defence


def names() -> list[str]:
    """The names of all rules."""
    return finding.names(__path__)


def load(name: str) -> type[Defence]:
    """The rule's class by its name. ``ValueError`` names the nearest one."""
    return finding.load(__name__, name, names(), Defence, "robust rule")
