"""What a client app runs: a TOML file, or a trainer function, in a form that reaches the client process.

It is read in the process that Flower starts for each message, so heavy imports are inside functions.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import RecordDict

from fedlora.flower.client_messages import handle_message, handle_trainer_message, load_node
from fedlora.flower.requirements import check_requirements
from fedlora.schema import ConfigError, Table, read_table

if TYPE_CHECKING:
    from fedlora.flower.trainer_client import TrainerClient


@dataclass(frozen=True)
class TomlSource:
    """A configuration in a TOML file."""

    path: Path

    def identity(self) -> str:
        """Return a text that changes with the configuration."""
        return self.path.read_text(encoding="utf-8")

    def to_table(self) -> Table:
        """Return JSON-able values, from which another process makes this source."""
        return {"config": str(self.path)}

    @cached_property
    def table(self) -> Table:
        """The configuration."""
        return read_table(self.path)

    def answer(self, kind: str, content: RecordDict, node_config: Mapping[str, Any], log: str) -> RecordDict | str:
        """Answer a message in this process."""
        return handle_message(kind, content, lambda run: load_node(self.table, node_config, run), log)


@dataclass(frozen=True)
class TrainerSource:
    """A trainer function and the function that evaluates, each as ``"module:function"``."""

    trainer: str
    evaluate: str | None
    requires: Mapping[str, Any]
    accepts: tuple[str, ...]
    path: tuple[str, ...]  # the folders from which their modules are imported

    def identity(self) -> str:
        """Return a text that changes with the function's module."""
        file = inspect.getsourcefile(importlib.import_module(self.trainer.partition(":")[0]))
        content = b"" if file is None else Path(file).read_bytes()
        return f"{self.to_table()} {file} {hashlib.blake2b(content, digest_size=12).hexdigest()}"

    def to_table(self) -> Table:
        """Return JSON-able values, from which another process makes this source."""
        return {
            "trainer": self.trainer, "evaluate": self.evaluate, "requires": dict(self.requires),
            "accepts": list(self.accepts), "path": list(self.path),
        }  # fmt: skip

    @cached_property
    def client(self) -> "TrainerClient":
        """The client, with the functions imported."""
        from fedlora.flower.trainer_client import TrainerClient

        sys.path[:] = list(dict.fromkeys([*self.path, *sys.path]))
        make, evaluate = (None if name is None else _load_function(name) for name in (self.trainer, self.evaluate))
        return TrainerClient(make, evaluate, self.requires, self.accepts)

    def answer(self, kind: str, content: RecordDict, node_config: Mapping[str, Any], log: str) -> RecordDict | str:
        """Answer a message in this process."""
        return handle_trainer_message(lambda: self.client, kind, content, node_config, log=log)


Source = TomlSource | TrainerSource


def read_source(
    config: str | Path | Callable[[Any], Any], evaluate: Callable[..., Any] | None, requires: Mapping[str, Any],
    accepts: Collection[str],
) -> Source:  # fmt: skip
    """Return the source of a client app's arguments. Raises ``ConfigError`` if they are wrong."""
    if isinstance(config, str | Path):
        if evaluate is not None or requires or accepts:
            raise ConfigError(
                "client_app was given a TOML file with evaluate, requires or accepts, which belong to a trainer "
                "function; leave them out."
            )
        return TomlSource(Path(config))
    check_requirements(requires)
    trainer = name_function(config, "the trainer function")
    name = None if evaluate is None else name_function(evaluate, "evaluate")
    return TrainerSource(trainer, name, dict(requires), tuple(accepts), tuple(sys.path))


def source_from_table(table: Table) -> Source:
    """Invert ``to_table``."""
    if "config" in table:
        return TomlSource(Path(table["config"]))
    return TrainerSource(
        table["trainer"], table["evaluate"], table["requires"], tuple(table["accepts"]), tuple(table["path"])
    )


def name_function(function: Any, what: str) -> str:
    """Return ``"module:function"``. Raises ``ConfigError`` for a function that another process cannot import."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(function) or module is None or name is None:
        raise ConfigError(f"{what} is {function!r}; give a function that a module defines.")
    if "<" in name or module == "__main__":
        kind = "a lambda" if "<lambda>" in name else "defined in a script" if module == "__main__" else "inside another"
        raise ConfigError(
            f"{what} {module}:{name} is {kind}, and the client process imports it by its name; define it with def at "
            "the top of the app's module."
        )
    return f"{module}:{name}"


def _load_function(name: str) -> Any:
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value
