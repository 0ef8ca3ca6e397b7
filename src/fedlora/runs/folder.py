"""The folder of a run: the one reader and writer of its files."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fedlora.adapters import Dense
from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.record import RoundRecord
from fedlora.files import load_tree, remove_temporary_files, save_json, save_tree, write
from fedlora.rounds import client_start, public_leaves
from fedlora.runs.build import head_rule
from fedlora.runs.config import Config, read
from fedlora.runs.file_names import (
    BASE_UPDATES,
    BEST,
    CLIENTS,
    COMPARISON,
    CONFIG,
    METRICS,
    PERSONAL,
    ROWS,
    SHARED,
    SUMMARY,
)
from fedlora.runs.interrupt import FULL
from fedlora.runs.result import Rounds
from fedlora.schema import ConfigError, Table, dumps, read_table
from fedlora.text import display_safe
from fedlora.types import Factors, Tree, Turn

NEEDED = (  # of a summary
    "labels", "metric", "base_updates", "method", "title", "bytes", "errors", "rounds", "seed", "versions",
)  # fmt: skip
LONGEST = 2**26  # characters of one round's record


@dataclass(frozen=True)
class RunFolder(Rounds):
    """The folder of a run. Each file is read when it is first needed, and only once.

    Raises ``ValueError`` where a file is missing or not readable.
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open the folder of a finished run and load its model. ``ValueError`` where it holds none."""
        run = cls(Path(path).expanduser())
        if (run.path / COMPARISON).exists():
            raise ConfigError(f"{str(run.path)!r} is a comparison; name the folder of one of its runs.")
        odd = [key for key in NEEDED if key not in run.summary]
        if odd:
            raise ConfigError(
                f"{str(run.path / SUMMARY)!r} has no {odd[0]!r}; it was edited, or is not of this version."
            )
        _ = run.base_updates, run.shared, run.config
        return run

    # ---------------------------------------------------------------------------------- settings and figures
    @cached_property
    def table(self) -> Table:
        """The resolved configuration, as TOML has it."""
        return read_table(self.path / CONFIG)

    @cached_property
    def config(self) -> Config:
        """The configuration of the run."""
        return read(self.path / CONFIG)

    @property
    def has_summary(self) -> bool:
        """Whether the run has ended, finished or interrupted."""
        return (self.path / SUMMARY).exists()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The figures of the whole run."""
        if self.has_summary:
            return read_json(self.path / SUMMARY)
        if any(file for way in ("*", "trials/*") for file in self.path.glob(f"{way}/{SUMMARY}")):
            raise ValueError(
                f"{str(self.path)!r} holds the folders of runs and no comparison of them; name one of these."
            )
        raise ValueError(
            f"{str(self.path)!r} holds no finished run: it has no {SUMMARY}; name a folder `fedlora run` made."
        )

    @cached_property
    def records(self) -> list[RoundRecord]:
        """The records of all rounds, as written so far."""
        return list(self.each_record())

    def each_record(self) -> Iterator[RoundRecord]:
        """Yield the record of each round, and hold none."""
        for count, line in enumerate(self.lines(), 1):
            if line.strip():
                yield _record(self.path / METRICS, count, line)

    def lines(self) -> Iterator[str]:
        """Yield the whole lines of the records; the last line may have been cut off, or may still be being written."""
        path = self.path / METRICS
        if not path.exists():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in iter(lambda: file.readline(LONGEST), ""):
                if not line.endswith("\n"):
                    return
                yield line

    @property
    def rows(self) -> dict[str, Any] | None:
        """The clients' numbers of rows and labels; None where they are not on this machine or are private."""
        return read_json(self.path / ROWS) if (self.path / ROWS).exists() else None

    @property
    def personal(self) -> dict[str, Any] | None:
        """The result of ``fedlora personal``; None before it."""
        return read_json(self.path / PERSONAL) if (self.path / PERSONAL).exists() else None

    def is_finished(self, rounds: int) -> bool:
        """Whether the run came to its end, at this many rounds or more."""
        return self.has_summary and not self.summary["interrupted"] and bool(self.summary["rounds"] >= rounds)

    # ------------------------------------------------------------------------------------------- the model
    @cached_property
    def shared(self) -> Tree:
        """The leaves that all clients share."""
        return {part: public_leaves(layer) for part, layer in load_tree(self.path / SHARED).items()}

    @cached_property
    def base_updates(self) -> Mapping[str, Factors]:
        """The sum of all updates of the base, part by part."""
        if not self.summary["base_updates"]:
            return {}
        return {part: Factors(leaves["U"], leaves["V"]) for part, leaves in load_tree(self.path / BASE_UPDATES).items()}

    def clients(self) -> list[int]:
        """The numbers of the clients that took part."""
        return list(range(self.config.clients.members))

    def kept_leaves(self, client: int) -> Tree:
        """The leaves that a client keeps for itself. ``ConfigError`` where they are on its own machine only."""
        method, file = self.config.method, self.client_file(client)
        if method.personal and not self.summary.get("kept", True):
            raise ConfigError(
                f"client {client}'s own part of {method.title} lies on its own machine and not in {str(self.path)!r}; "
                "write it there with `fedlora flower result`, and export that."
            )
        return load_tree(file) if file.exists() else {}

    def tree(self, client: int | None) -> Tree:
        """The adapter of one client, or of all (None). ``ConfigError`` where there is no such model."""
        method, count = self.config.method, self.config.clients.count
        if client is None and method.personal:
            raise ConfigError(
                f"{method.title} ends with a model for each client and none for all; export one with --client K, or "
                "all with --all-clients."
            )
        if client is not None and not 0 <= client < count:
            raise ConfigError(f"there is no client {client}; the run has the clients 0 to {count - 1}.")
        if client is None:
            return self.shared
        budget = self.config.clients.budgets(method.adapter.budget, self.config.seed)[client]
        rules = {
            part: method if method.adapter.trainable & set(layer) else head_rule(method, Dense(frozenset(layer)))
            for part, layer in self.shared.items()
        }
        return client_start(rules, self.shared, self.kept_leaves(client), Turn(self.config.rounds, client, budget))

    def network(self) -> nn.Module:
        """Load the pretrained network, with a head of the run's size."""
        labels = self.summary["labels"]
        found = self.config.task.network(self.config.model.name, len(labels), self.config.seed)
        if labels:
            found.config.id2label = dict(enumerate(labels))
            found.config.label2id = {name: i for i, name in found.config.id2label.items()}
        return found.eval()

    # --------------------------------------------------------------------------------------------- writing
    def client_file(self, client: int) -> Path:
        """The path of the leaves that a client keeps for itself."""
        return self.path / CLIENTS / f"{client}.safetensors"

    @property
    def best(self) -> "RunFolder":
        """The folder of the best round's model."""
        return RunFolder(self.path / BEST)

    @contextmanager
    def claim(self, again: bool) -> Iterator[None]:
        """Make this a folder that a run may write into, and undo that where the run cannot begin.

        ``ConfigError`` where it holds a run, unless ``again``.
        """
        if not again and ((self.path / CONFIG).exists() or self.has_summary):
            raise ConfigError(
                f"{str(self.path)!r} holds a run already; `fedlora resume {self.path}` goes on with it, or choose "
                "another folder with --out."
            )
        try:
            if not (self.path / METRICS).exists():
                write(self.path / METRICS, b"")
        except OSError as error:
            if error.errno in FULL:
                raise
            raise ConfigError(
                f"cannot write to {str(self.path)!r}: {error.strerror}; choose another folder."
            ) from error
        try:
            yield
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if not (self.path / CONFIG).exists():
            (self.path / METRICS).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def remove_partial_files(self) -> None:
        """Remove what a killed process had begun to write."""
        for place in (self.path, self.path / BEST):
            remove_temporary_files(place)
            remove_temporary_files(place / CLIENTS)

    def write_config(self, table: Table) -> None:
        """Write the resolved configuration."""
        write(self.path / CONFIG, dumps(table).encode())

    def write_records(self, records: list[RoundRecord]) -> None:
        """Write the records of all rounds."""
        write(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in records).encode())

    def write_result(
        self, shared: Tree, kept: Mapping[int, Tree], base_updates: BaseUpdateLog, summary: Mapping[str, Any]
    ) -> None:
        """Write the model and, last, the summary."""
        save_tree(self.path / SHARED, {part: public_leaves(layer) for part, layer in shared.items()})
        if len(base_updates):
            save_tree(self.path / BASE_UPDATES, {part: f._asdict() for part, f in base_updates.total().items()})
        for client, tree in kept.items():
            if any(tree.values()):
                save_tree(self.client_file(client), tree)
        save_json(self.path / SUMMARY, summary)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON table. ``ValueError`` where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{display_safe(path)!r} is not readable JSON: {error}; it was cut short or edited."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{display_safe(path)!r} holds no table of names and values; it was edited.")
    return found


def _record(path: Path, count: int, line: str) -> RoundRecord:
    try:
        found: RoundRecord = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {count} of {display_safe(path)!r} is not readable JSON: {error}; it was edited."
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("round"), int):
        raise ValueError(f"line {count} of {display_safe(path)!r} is no round's record; it was edited.")
    return found
