"""Kinds of problem, one a file. The file's name is the task's name."""

from fedlora.registry import Registry
from fedlora.tasks._base import Supervised

TASKS = Registry(Supervised, "task", group="fedlora.tasks", package=__name__)
