"""Robust rules, one a file. The file's name is the rule's name."""

from fedlora.registry import Registry
from fedlora.security.robust._base import Defence

ROBUST_RULES = Registry(Defence, "robust rule", group="fedlora.robust", package=__name__)
