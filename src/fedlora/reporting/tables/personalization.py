"""A run's models side by side, as a table."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedlora.reporting.terminal import DASH, printed

TITLES = {
    "global": "global",
    "held": "what it holds",
    "tuned": "after {steps} steps of its own",
    "local": "alone",
    "centralised": "centralised",
}
MEANS = {"mean": "mean over clients", "examples_mean": "over all their rows", "worst": "worst client"}


def personal(found: Mapping[str, Any], folder: str) -> None:
    """Means, the worst and each client; clients that never took part below."""
    name = found["metric"]["name"].replace("_", " ").capitalize()
    own = _table(found["columns"], f"{name} on the clients' own test rows, {found['title']}", found["steps"])
    new = [_table(found["new"], f"{name} of clients that never took part", found["steps"])] if found["new"] else []
    printed(own, *new, f"Folder: {folder}")


def _table(columns: Mapping[str, Any], title: str, steps: int) -> Table:
    table = Table(title=title)
    table.add_column("client")
    for name in columns:
        table.add_column(TITLES[name].format(steps=steps), justify="right")
    there = next(column for column in columns.values() if column is not None)
    for key, what in MEANS.items():
        table.add_row(what, *(_figure(column and column[key]) for column in columns.values()))
    table.add_section()
    for client in (k for k, value in enumerate(there["each"]) if value is not None):
        table.add_row(str(client), *(_figure(column and column["each"][client]) for column in columns.values()))
    return table


def _figure(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"
