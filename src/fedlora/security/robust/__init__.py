"""Robust aggregators, one a file, named by the file. They are found in this folder; there is no list."""

from fedlora import registry as finding
from fedlora.security.robust._base import RobustAggregator


def names() -> list[str]:
    """The names of all robust aggregators."""
    return finding.names(__path__)


def load(name: str) -> type[RobustAggregator]:
    """Loads an aggregator's class by its name. ``ValueError`` names the nearest one."""
    return finding.load(__name__, name, names(), RobustAggregator, "robust aggregator")
