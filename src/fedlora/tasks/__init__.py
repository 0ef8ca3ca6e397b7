"""Kinds of problem, one a file. The file's name is the task's name."""

from fedlora.registry import Registry
from fedlora.tasks._base import Task

TASKS = Registry(Task, "task", group="fedlora.tasks", package=__name__)  # type: ignore[type-abstract]
names, load = TASKS.names, TASKS.load
