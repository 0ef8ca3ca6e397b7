"""The tables of ``fedlora personal``: a run's models side by side, client by client."""

from collections.abc import Mapping
from typing import Any

from fedlora.runs.table import Column, Table

TITLES = {
    "global": "global",
    "held": "what it holds",
    "tuned": "after {steps} steps of its own",
    "local": "alone",
    "centralised": "centralised",
}
MEANS = {"mean": "mean over clients", "examples_mean": "over all their rows", "worst": "worst client"}


def tabulate_personal(found: Mapping[str, Any]) -> list[Table]:
    """Build the tables of means, the worst and each client; and those of the clients that never took part."""
    name = found["metric"]["name"].replace("_", " ").capitalize()
    tables = [_build_table(found["columns"], f"{name} on the clients' own test rows, {found['title']}", found["steps"])]
    if found["new"]:
        tables.append(_build_table(found["new"], f"{name} of clients that never took part", found["steps"]))
    return tables


def _build_table(columns: Mapping[str, Any], title: str, steps: int) -> Table:
    scored = {name: column for name, column in columns.items() if column is not None}
    rows = [{"client": what, **{name: one[key] for name, one in scored.items()}} for key, what in MEANS.items()]
    clients = [k for k, value in enumerate(next(iter(scored.values()))["each"]) if value is not None]
    rows += [{"client": str(k), **{name: one["each"][k] for name, one in scored.items()}} for k in clients]
    figures = (Column(name, TITLES[name].format(steps=steps), 4) for name in columns)
    return Table("personal", title, (Column("client", "client"), *figures), rows, rules=frozenset({len(MEANS)}))
