"""One class a file, found by looking in a folder: the file's name is the class's name in a configuration."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from typing import TypeVar

from fedlora.nearest import unknown

T = TypeVar("T")


def names(path: Iterable[str]) -> list[str]:
    """The names that the files of a package stand for; ``path`` is its ``__path__``."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(path))


def load(package: str, name: str, known: Sequence[str], kind: type[T], word: str) -> type[T]:
    """The one ``kind`` that the file of a name defines. ``ValueError`` names the nearest of the ``known`` names."""
    if name not in known:
        raise ValueError(unknown(word, name, known, f"{word}s"))
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, kind)]
    if len(found) != 1:
        raise ValueError(f"{module.__name__} defines {len(found)} {word}s; a {word}'s file defines exactly one.")
    return found[0]
