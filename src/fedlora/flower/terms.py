"""The terms of a run of clients with their own trainers: settings and first leaves, from the server to each client.

A client process has a trainer and no configuration. The first message of a run brings it; see ``requirements`` for the
checks of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.engines.model_spec import ModelSpec
from fedlora.files import load_about, load_tree, save_tree
from fedlora.flower.requirements import NUMBERS, SENT, RefusedTermsError
from fedlora.flower.wire import record_to_tree, tree_to_record
from fedlora.schema import Table, flatten_table
from fedlora.types import Tree

TERMS, START = "terms", "start"  # names of records
LONGEST = 2**25  # characters of a table or a description


@dataclass(frozen=True)
class Terms:
    """The settings of a run, the description of its model, and the first leaves that no seed determines."""

    table: Table
    spec: ModelSpec
    start: Tree

    @classmethod
    def of(cls, table: Table, spec: ModelSpec, start: Tree) -> "Terms":
        """Return the terms of a run's configuration ``table``."""
        return cls({key: x for key, x in table.items() if key in (*SENT, *NUMBERS)}, spec, start)

    @cached_property
    def texts(self) -> dict[str, str]:
        """The settings and the description, as JSON."""
        return {"table": json.dumps(self.table, sort_keys=True), "model": self.spec.to_json()}

    def to_records(self) -> dict[str, ConfigRecord | ArrayRecord]:
        """Return the records of the first message."""
        start = {START: tree_to_record(self.start)} if self.start else {}
        return {TERMS: ConfigRecord(dict(self.texts)), **start}

    @classmethod
    def from_records(cls, content: RecordDict) -> "Terms":
        """Invert ``to_records``. Raises ``RefusedTermsError`` if the message has no terms."""
        if TERMS not in content:
            raise RefusedTermsError(
                "the server sent no settings, and this client's app has a trainer and no configuration; make the "
                "server's app by server_app(method=..., clients=...)"
            )
        start = record_to_tree(content[START]) if START in content else {}
        return cls._parse(content[TERMS], start)

    @classmethod
    def _parse(cls, texts: Mapping[str, Any], start: Tree) -> "Terms":
        if any(not isinstance(texts[key], str) or len(texts[key]) > LONGEST for key in ("table", "model")):
            raise RefusedTermsError("the server's settings are no texts, or too long")
        table = json.loads(texts["table"])
        if not isinstance(table, dict) or not all(isinstance(table.get(key, {}), dict) for key in SENT):
            raise RefusedTermsError("the server's settings are no tables")
        return cls(table, ModelSpec.from_json(texts["model"]), start)

    def save(self, path: Path) -> None:
        """Write the terms to a file, for the next process of this client."""
        save_tree(path, self.start, {"about": json.dumps(self.texts)})

    @classmethod
    def load(cls, path: Path) -> "Terms":
        """Return the terms that ``save`` wrote. Raises ``ValueError`` if the file is broken."""
        return cls._parse(load_about(path), load_tree(path))

    def describe(self) -> str:
        """Return a line on what the server has set, for the client's log."""
        flat = flatten_table(self.table)
        keys = ("method.name", "rounds", "privacy.level", "flower.secure_aggregation", "compression.up")
        return ", ".join(f"{key} = {flat[key]}" for key in keys if key in flat)
