"""The methods with their claims and costs, and the page of one of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.runs.table import Column, Table

CLAIMS = {"exact": "exact", "any_rank": "any rank", "personal": "personal", "secure_aggregation": "secure aggr."}


def methods(entries: Sequence[Mapping[str, Any]]) -> Table:
    """All methods, with claims and bytes."""
    rows = [
        {"name": one["name"], "idea": one["idea"], **{key: "yes" if one["claims"][key] else None for key in CLAIMS}}
        | {direction: one["bytes"][direction] for direction in ("up", "down")}
        for one in entries
    ]
    claims = (Column(key, title, align="center") for key, title in CLAIMS.items())
    columns = (
        Column("name", "name"),
        Column("idea", "idea"),
        *claims,
        Column("up", "up", 0),
        Column("down", "down", 0),
    )
    return Table("methods", f"Bytes: {entries[0]['bytes_of']}" if entries else "No methods", columns, rows)


def method(one: Mapping[str, Any]) -> list[str]:
    """The page of one method, in lines."""
    claims = [key.replace("_", " ") for key, value in one["claims"].items() if value] or ["none"]
    advice = [f"{words} {one[key]}" for words, key in (("Use it when", "use"), ("Not when", "avoid")) if one[key]]
    return [
        f"{one['title']} ({one['name']}): {one['idea']}.\n\n{one['equation']}\n",
        f"Paper: {one['reference']}",
        *advice,
        f"Changes from FedIT: {', '.join(one['changes']) or 'nothing'}",
        f"Claims: {', '.join(claims)}",
        f"Adapters: {', '.join(one['adapters'])}",
        f"Privacy: {one['privacy']}",
        f"Settings of [method]: {', '.join(f'{k} = {v!r}' for k, v in one['settings'].items())}",
        f"Bytes up {one['bytes']['up']:,.0f}, down {one['bytes']['down']:,.0f} ({one['bytes_of']})",
    ]
