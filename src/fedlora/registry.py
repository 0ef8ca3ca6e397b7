"""Plug-ins by name: a file of a package, an entry point of an installed package, or ``"package.module:Class"``."""

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes of one kind that a configuration can name.

    A name is looked up in this order:

    1. Built-in plug-ins. Each file of ``package`` defines one subclass of ``base`` and gives it its name, with ``-``
       for ``_``. Files whose name begins with ``_`` are machinery. ``listed`` names classes that have no file of their
       own, as ``"package.module:Class"``. Other packages cannot replace a built-in plug-in.
    2. Entry points of installed packages in ``group``. If two packages use one name, the first on ``sys.path`` counts.
    3. ``"package.module:Class"``: any class that can be imported.

    A class must be a dataclass that extends ``base``; the fields are its settings. Everything that cannot be loaded is
    a ``ValueError`` of one sentence. An entry point is loaded only if it is used.
    """

    base: type[T]
    noun: str  # in messages, e.g. "method"
    group: str  # of entry points, e.g. "fedlora.methods"
    package: str = ""  # of the built-in plug-ins; empty: ``listed`` has all of them
    listed: Mapping[str, str] = field(default_factory=dict)
    reserved: tuple[str, ...] = ()  # other values that a configuration accepts, which stand for no class

    @property
    def builtin(self) -> dict[str, str]:
        """The names of the built-in plug-ins, each with its module or with ``"package.module:Class"``."""
        spec = find_spec(self.package) if self.package else None
        places = spec.submodule_search_locations if spec else None
        files = [m.name for m in pkgutil.iter_modules(places or []) if not m.ispkg and not m.name.startswith("_")]
        return {name.replace("_", "-"): f"{self.package}.{name}" for name in files} | dict(self.listed)

    def names(self) -> list[str]:
        """Return all names of built-in plug-ins and entry points, without importing them."""
        return sorted({*self.builtin, *_find_plugins(self.group)})

    def load(self, name: str) -> type[T]:
        """Return the class of a name, or of ``"package.module:Class"``.

        Raises ``ValueError`` if there is no such plug-in (with the nearest name), if it cannot be imported, or if it is
        of another kind; ``ImportError`` if a built-in plug-in needs a package that is not installed.
        """
        if place := self.builtin.get(name):
            return self._from_path(place) if ":" in place else self._from_file(place)
        if point := _find_plugins(self.group).get(name):
            package = f" of the package {point.dist.name!r}" if point.dist else ""
            return self._from_outside(point.value, f"the {self.noun} {name!r}{package}")
        if ":" not in name:
            raise ValueError(unknown(self.noun, name, [*self.reserved, *self.names()], f"{self.noun}s"))
        return self._from_outside(name, f"the {self.noun} {name!r}")

    def check(self, name: str) -> None:
        """Raise the errors of ``load``, but import no built-in plug-in."""
        if name not in self.builtin:
            self.load(name)

    def classes(self) -> dict[str, type[T]]:
        """Return all classes by name, except entry points that cannot be loaded; ``errors`` has these."""
        return {name: kind for name in self.names() if not isinstance(kind := self._try(name), str)}

    def errors(self) -> list[str]:
        """Return one sentence for each entry point that cannot be loaded."""
        return [error for name in _find_plugins(self.group) if isinstance(error := self._try(name), str)]

    def name_of(self, kind: type) -> str:
        """Return the name that leads to a class: the inverse of ``load``.

        A class of another package has the name of its entry point, or else ``"package.module:Class"``. Raises
        ``ValueError`` if no name leads to the class, because it was defined inside a function.
        """
        module, path = kind.__module__, f"{kind.__module__}:{kind.__qualname__}"
        root = module.partition(".")[0]
        names = [name for name, place in self.builtin.items() if place in (module, path)]
        names += [name for name, point in _find_plugins(self.group).items() if re.split("[.:]", point.value)[0] == root]
        for name in [*names, path]:
            if self._try(name) is kind:
                return name
        raise ValueError(
            f"the {self.noun} {path} cannot be imported by name, so the run could not be repeated; define it at the "
            "top of a module."
        )

    def _try(self, name: str) -> type[T] | str:
        try:
            return self.load(name)
        except ValueError as error:
            return str(error)

    def _from_file(self, place: str) -> type[T]:
        module = importlib.import_module(place)
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == place]
        classes = [c for c in classes if issubclass(c, self.base)]
        if len(classes) != 1:
            raise ValueError(f"{place} defines {len(classes)} {self.noun}s; a {self.noun}'s file defines exactly one.")
        return cast("type[T]", classes[0])

    def _from_path(self, path: str) -> Any:
        module, _, name = path.partition(":")
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def _from_outside(self, path: str, subject: str) -> type[T]:
        """Return the class at a path, checked; ``subject`` names it in messages."""
        try:
            kind = self._from_path(path)
        except Exception:
            error = sys.exception()  # another package's module may raise anything while it is imported
            raise ValueError(f"{subject} could not be loaded: {str(error) or type(error).__name__}.") from error
        if not (inspect.isclass(kind) and issubclass(kind, self.base)):
            base = f"{self.base.__module__.removesuffix('._base')}.{self.base.__name__}"
            raise ValueError(f"{subject} is not a {base}; name a class that extends it.")
        if missing := sorted(getattr(kind, "__abstractmethods__", ())):
            raise ValueError(f"{subject} does not define {', '.join(missing)}, which {self.base.__name__} asks for.")
        if not is_dataclass(kind):
            raise ValueError(f"{subject} is no dataclass; write @dataclass(frozen=True) above it.")
        return cast("type[T]", kind)


def _find_plugins(group: str) -> dict[str, "EntryPoint"]:
    """Return the entry points of a group by name; the first on ``sys.path`` counts."""
    return {point.name: point for point in reversed(tuple(_entry_points(tuple(sys.path)).select(group=group)))}


@cache
def _entry_points(path: tuple[str, ...]) -> Any:
    """Return all entry points. Cached, because this reads every package on ``path``."""
    from importlib.metadata import entry_points

    return entry_points()


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that begins with ``name``, or else the most similar one, or None."""
    options = list(known)
    begun = [option for option in options if len(name) > 2 and option.startswith(name.lower())]
    alike = difflib.get_close_matches(name.lower().replace("_", "-"), options, n=1, cutoff=0.5)
    alike = alike or difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return next(iter(begun or alike), None)


def name_or_nearest(what: str, name: str, known: Iterable[str]) -> tuple[str | None, str]:
    """Return the known name, or else the nearest or None, and the subject of a sentence about it."""
    options = list(known)
    if name in options:
        return name, f"the {what} {name!r}"
    near = nearest(name, options)
    return near, f"there is no {what} {name!r}, and the nearest, {near!r},"


def unknown(what: str, name: str, known: Iterable[str], plural: str) -> str:
    """Return a sentence that a name is unknown, with the nearest name and all names."""
    options = list(known)
    near = nearest(name.rpartition(".")[2], options)
    hint = f"; did you mean {near!r}?" if near else "."
    return f"there is no {what} {name!r}{hint} The {plural} are {', '.join(options)}."
