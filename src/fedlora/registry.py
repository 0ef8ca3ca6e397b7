"""One class a file, found by looking in a folder: the file's name is the class's name in a configuration."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def names(path: Iterable[str]) -> list[str]:
    """The names of a package's files, without those that begin with ``_``; ``path`` is the package's ``__path__``."""
    files = [m.name for m in pkgutil.iter_modules(path) if not m.ispkg and not m.name.startswith("_")]
    return sorted(name.replace("_", "-") for name in files)


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


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` begins, or else the most alike; None where none is near."""
    options = list(known)
    begun = [option for option in options if len(name) > 2 and option.startswith(name.lower())]
    alike = difflib.get_close_matches(name.lower().replace("_", "-"), options, n=1, cutoff=0.5)
    alike = alike or difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return (begun or alike or [None])[0]


def name_or_nearest(what: str, name: str, known: Iterable[str]) -> tuple[str | None, str]:
    """The known name, or else the nearest (None where none is near), and the subject of a sentence about it."""
    options = list(known)
    if name in options:
        return name, f"the {what} {name!r}"
    near = nearest(name, options)
    return near, f"there is no {what} {name!r}, and the nearest, {near!r},"


def unknown(what: str, name: str, known: Iterable[str], plural: str) -> str:
    """One sentence: that there is no such thing, which was meant, and what there is."""
    options = list(known)
    near = nearest(name.rpartition(".")[2], options)
    hint = f"; did you mean {near!r}?" if near else "."
    return f"there is no {what} {name!r}{hint} The {plural} are {', '.join(options)}."
