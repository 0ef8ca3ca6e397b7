"""What ``fedlora doctor`` found, as a table."""

from collections.abc import Mapping
from typing import Any

from fedlora.reporting.terminal import show
from fedlora.runs.table import Column, Table

GB = 1e9


def health(found: Mapping[str, Any]) -> None:
    """The machine, then a row a test."""
    memory = found["memory"]
    here = [f"fedlora {found['fedlora']}, Python {found['python']}, {found['system']}", _cpu(found["processors"])]
    here += [f"memory: {memory['free'] / GB:.1f} GB free of {memory['bytes'] / GB:.1f}"] if memory else []
    here += [f"disk: {found['disk'] / GB:.1f} GB free here"]
    here += [_device(one) for one in found["devices"]]
    rows = [
        {**one, "packages": ", ".join(f"{name} {version or '–'}" for name, version in one["packages"].items())}
        for one in found["tests"]
    ]
    columns = (Column("name", "what"), Column("packages", "packages"), Column("state", "state"), Column("said", "said"))
    table = Table("doctor", "What is installed, and whether it works", columns, rows)
    broken = ", ".join(found["broken"])
    show(*here, table, f"Broken: {broken}." if broken else "Nothing is broken.")


def _cpu(count: int | None) -> str:
    return f"processors: {count}"


def _device(one: Mapping[str, Any]) -> str:
    if "bytes" not in one:
        return f"{one['name']}: {one['threads']} threads"
    return f"{one['name']}: {one['kind']}, {one['free'] / GB:.1f} GB free of {one['bytes'] / GB:.1f}"
