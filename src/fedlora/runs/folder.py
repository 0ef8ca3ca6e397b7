"""The folder of a run: the one reader and writer of its files."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora.adapters import Adapter, Dense, LoRA
from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.record import RoundRecord
from fedlora.files import load_tree, remove_temporary_files, save_json, save_tree, write
from fedlora.rounds import client_start, public_leaves
from fedlora.runs import file_names as names
from fedlora.runs.build import head_rule, is_loaded_half
from fedlora.runs.config import Config, read
from fedlora.runs.interrupt import FULL
from fedlora.runs.result import Rounds
from fedlora.schema import ConfigError, Table, dumps, read_table
from fedlora.tasks.networks.pretrained import stored_dtype
from fedlora.text import display_safe
from fedlora.training.device import Engine
from fedlora.training.peft_settings import pattern_for
from fedlora.types import Factors, Tree, Turn

NEEDED = (  # of a summary
    "labels", "metric", "base_updates", "method", "title", "bytes", "errors", "rounds", "seed", "versions",
)  # fmt: skip
LONGEST = 2**26  # characters of one round's record


@dataclass(frozen=True)
class RunFolder(Rounds):
    """The folder of a run. Each file is read once, when it is first needed.

    Raises ``ValueError`` if a file is missing or unreadable.
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open the folder of a finished run and load its model. Raises ``ValueError`` for any other folder."""
        run = cls(Path(path).expanduser())
        if (run.path / names.COMPARISON).exists():
            raise ConfigError(f"{str(run.path)!r} is a comparison; name the folder of one of its runs.")
        if missing := [key for key in NEEDED if key not in run.summary]:
            file = run.path / names.SUMMARY
            raise ConfigError(f"{str(file)!r} has no {missing[0]!r}; it was edited, or is not of this version.")
        _ = run.base_updates, run.shared, run.config
        return run

    # ---------------------------------------------------------------------------------- settings and figures
    @cached_property
    def table(self) -> Table:
        """The TOML of the configuration, with all defaults."""
        return read_table(self.path / names.CONFIG)

    @cached_property
    def config(self) -> Config:
        """The configuration of the run."""
        return read(self.path / names.CONFIG)

    @property
    def has_summary(self) -> bool:
        """Whether the run has ended, finished or interrupted."""
        return (self.path / names.SUMMARY).exists()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The figures of the whole run."""
        if self.has_summary:
            return read_json(self.path / names.SUMMARY)
        if any(file for way in ("*", "trials/*") for file in self.path.glob(f"{way}/{names.SUMMARY}")):
            raise ValueError(
                f"{str(self.path)!r} holds the folders of runs and no comparison of them; name one of these."
            )
        raise ValueError(
            f"{str(self.path)!r} holds no finished run: it has no {names.SUMMARY}; name a folder `fedlora run` made."
        )

    @cached_property
    def records(self) -> list[RoundRecord]:
        """The records of all rounds, as written so far."""
        return list(self.each_record())

    def each_record(self) -> Iterator[RoundRecord]:
        """Yield the record of each round, one at a time."""
        for count, line in enumerate(self.lines(), 1):
            if line.strip():
                yield _parse_record(self.path / names.METRICS, count, line)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the records without an incomplete last one."""
        path = self.path / names.METRICS
        if not path.exists():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in iter(lambda: file.readline(LONGEST), ""):
                if not line.endswith("\n"):
                    return
                yield line

    @property
    def rows(self) -> dict[str, Any] | None:
        """The clients' numbers of rows and labels; None if they are private or on other machines."""
        return read_json(self.path / names.ROWS) if (self.path / names.ROWS).exists() else None

    @property
    def personal(self) -> dict[str, Any] | None:
        """The result of ``fedlora personal``; None before it."""
        return read_json(self.path / names.PERSONAL) if (self.path / names.PERSONAL).exists() else None

    def is_finished(self, rounds: int) -> bool:
        """Whether the run has ended, and has at least ``rounds`` rounds."""
        return self.has_summary and not self.summary["interrupted"] and bool(self.summary["rounds"] >= rounds)

    # ------------------------------------------------------------------------------------------- the model
    @cached_property
    def shared(self) -> Tree:
        """The leaves that all clients share."""
        return {part: public_leaves(layer) for part, layer in load_tree(self.path / names.SHARED).items()}

    @property
    def initial(self) -> Tree:
        """The first leaves of a model of PEFT; empty if the seed determines them."""
        return load_tree(self.path / names.INITIAL) if (self.path / names.INITIAL).exists() else {}

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configuration of the PEFT adapter that the run trained; empty for fedlora's own adapters."""
        return read_json(self.path / names.PEFT_CONFIG) if (self.path / names.PEFT_CONFIG).exists() else {}

    @cached_property
    def base_updates(self) -> Mapping[str, Factors]:
        """The sum of all updates of the base, part by part."""
        if not self.summary["base_updates"]:
            return {}
        tree = load_tree(self.path / names.BASE_UPDATES)
        return {part: Factors(leaves["U"], leaves["V"]) for part, leaves in tree.items()}

    def clients(self) -> list[int]:
        """Return the numbers of the clients that took part."""
        return list(range(self.config.clients.members))

    def kept_leaves(self, client: int) -> Tree:
        """Return the leaves that a client keeps. Raises ``ConfigError`` if they are only on its own machine."""
        method, file = self.config.method, self.client_file(client)
        if method.personal and not self.summary.get("kept", True):
            raise ConfigError(
                f"client {client}'s own part of {method.title} lies on its own machine and not in {str(self.path)!r}; "
                "write it there with `fedlora flower result`, and export that."
            )
        return load_tree(file) if file.exists() else {}

    def tree(self, client: int | None) -> Tree:
        """Return a client's adapter, or the shared one (None). Raises ``ConfigError`` if there is none."""
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
            part: replace(method, adapter=self.adapter_of(part))
            if method.adapter.trainable & set(layer)
            else head_rule(method, Dense(frozenset(layer)))
            for part, layer in self.shared.items()
        }
        return client_start(rules, self.shared, self.kept_leaves(client), Turn(self.config.rounds, client, budget))

    def adapter_of(self, part: str) -> Adapter:
        """Return the adapter of one weight; only the patterns of a PEFT configuration give weights different ones."""
        adapter, config = self.config.method.adapter, self.peft_config
        if not isinstance(adapter, LoRA) or not config:
            return adapter
        ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
        rank, alpha = ranks.get(pattern_for(ranks, part), adapter.rank), alphas.get(pattern_for(alphas, part))
        return replace(adapter, rank=rank, alpha=adapter.alpha if alpha is None else float(alpha))

    def network(self, precision: str | None = None, stored: bool = False) -> nn.Module:
        """Load the pretrained network, with a head of the run's size, for a precision or that of the run.

        A checkpoint in half precision is loaded in bfloat16, or with ``stored`` in its own dtype.
        """
        labels, config, loading = self.summary["labels"], self.config, dict[str, Any]()
        if is_loaded_half(config, precision or config.training.precision, Engine()):
            loading = {"loading": {"dtype": stored_dtype(config.model.name) if stored else torch.bfloat16}}
        network = config.task.network(config.model.name, len(labels), config.seed, **loading)
        if labels and not self.config.task.is_own_code:
            network.config.id2label = dict(enumerate(labels))
            network.config.label2id = {name: i for i, name in enumerate(labels)}
        return network.eval()

    # --------------------------------------------------------------------------------------------- writing
    def client_file(self, client: int) -> Path:
        """Return the path of the leaves that a client keeps."""
        return self.path / names.CLIENTS / f"{client}.safetensors"

    @property
    def best(self) -> "RunFolder":
        """The folder of the best round's model."""
        return RunFolder(self.path / names.BEST)

    @contextmanager
    def claim(self, again: bool) -> Iterator[None]:
        """Make the folder writable for a run, and undo that if the block raises before the run has begun.

        Raises ``ConfigError`` if it has a run, unless ``again``.
        """
        if not again and ((self.path / names.CONFIG).exists() or self.has_summary):
            raise ConfigError(
                f"{str(self.path)!r} holds a run already; `fedlora resume {self.path}` goes on with it, or choose "
                "another folder with --out."
            )
        try:
            if not (self.path / names.METRICS).exists():
                write(self.path / names.METRICS, b"")
        except OSError as error:
            if error.errno in FULL:
                raise
            raise ConfigError(
                f"cannot write to {str(self.path)!r}: {error.strerror}; choose another folder."
            ) from error
        try:
            yield
        finally:
            if not (self.path / names.CONFIG).exists():
                (self.path / names.METRICS).unlink(missing_ok=True)
                if not any(self.path.iterdir()):
                    self.path.rmdir()

    def remove_partial_files(self) -> None:
        """Remove the temporary files of a killed process."""
        for place in (self.path, self.path / names.BEST):
            remove_temporary_files(place)
            remove_temporary_files(place / names.CLIENTS)

    def write_config(self, table: Table) -> None:
        """Write the resolved configuration."""
        write(self.path / names.CONFIG, dumps(table).encode())

    def write_records(self, records: list[RoundRecord]) -> None:
        """Write the records of all rounds."""
        write(self.path / names.METRICS, "".join(json.dumps(record) + "\n" for record in records).encode())

    def write_result(
        self, shared: Tree, kept: Mapping[int, Tree], base_updates: BaseUpdateLog, summary: Mapping[str, Any]
    ) -> None:
        """Write the model and, last, the summary."""
        save_tree(self.path / names.SHARED, {part: public_leaves(layer) for part, layer in shared.items()})
        if len(base_updates):
            save_tree(self.path / names.BASE_UPDATES, {part: f._asdict() for part, f in base_updates.total().items()})
        for client, tree in kept.items():
            if any(tree.values()):
                save_tree(self.client_file(client), tree)
        save_json(self.path / names.SUMMARY, summary)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON table. Raises ``ValueError`` if the file has none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{display_safe(path)!r} is not readable JSON: {error}; it was cut short or edited."
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"{display_safe(path)!r} holds no table of names and values; it was edited.")
    return table


def _parse_record(path: Path, count: int, line: str) -> RoundRecord:
    try:
        record: RoundRecord = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {count} of {display_safe(path)!r} is not readable JSON: {error}; it was edited."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("round"), int):
        raise ValueError(f"line {count} of {display_safe(path)!r} is no round's record; it was edited.")
    return record
