"""What ``fedlora doctor`` found, as a table."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedlora.reporting.console import printed

GB = 1e9


def health(found: Mapping[str, Any]) -> None:
    """The machine, then a row a test."""
    memory = found["memory"]
    here = [f"fedlora {found['fedlora']}, Python {found['python']}, {found['system']}", _cpu(found["processors"])]
    here += [f"memory: {memory['free'] / GB:.1f} GB free of {memory['bytes'] / GB:.1f}"] if memory else []
    here += [f"disk: {found['disk'] / GB:.1f} GB free here"]
    here += [_device(one) for one in found["devices"]]
    table = Table(title="What is installed, and whether it works")
    for name in ("what", "packages", "state", "said"):
        table.add_column(name, overflow="fold")
    for one in found["tests"]:
        packages = ", ".join(f"{name} {version or '–'}" for name, version in one["packages"].items())
        table.add_row(one["name"], packages, one["state"], one["said"])
    broken = ", ".join(found["broken"])
    printed(*here, table, f"Broken: {broken}." if broken else "Nothing is broken.")


def _cpu(count: int | None) -> str:
    return f"processors: {count}"


def _device(one: Mapping[str, Any]) -> str:
    if "bytes" not in one:
        return f"{one['name']}: {one['threads']} threads"
    return f"{one['name']}: {one['kind']}, {one['free'] / GB:.1f} GB free of {one['bytes'] / GB:.1f}"
