"""Robust aggregators, one a file. The file's name is the aggregator's name."""

from fedlora.registry import Registry
from fedlora.security.robust._base import RobustAggregator

ROBUST_RULES = Registry(RobustAggregator, "robust aggregator", group="fedlora.robust", package=__name__)
names, load = ROBUST_RULES.names, ROBUST_RULES.load
