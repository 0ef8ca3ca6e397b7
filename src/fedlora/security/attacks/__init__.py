"""Attacks, one a file. The file's name is the attack's name."""

from fedlora.registry import Registry
from fedlora.security.attacks._base import Attack

ATTACKS = Registry(Attack, "attack", group="fedlora.attacks", package=__name__)
names, load = ATTACKS.names, ATTACKS.load
