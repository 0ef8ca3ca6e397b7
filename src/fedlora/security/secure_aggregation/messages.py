"""What crosses the wire between two parties, and what a party keeps between two phases, as bytes.

These are tables of integers and sealed bytes and no trees, so they are not written as ``fedlora.files`` writes trees.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedlora.security.secure_aggregation.session import ProtocolError

PHASES = ("advertise", "share", "masked", "unmask")  # what clients send, in this order
REPLIES = {"share": "peers", "masked": "inbox", "unmask": "survivors"}  # what the server sends before each
NUMBER = 8  # bytes

Table = list[tuple[int, bytes]]  # entries of one width; what a party claims may name a client twice


@dataclass(frozen=True)
class Message:
    """One sealed message. The header is for delivery; the seal covers it, so altering it is noticed."""

    phase: str
    sender: int
    receiver: int
    body: bytes = field(repr=False)

    def record(self) -> dict[str, Any]:
        """As text, integers and bytes; ``Message(**record)`` is the message again."""
        return asdict(self)


def packed(table: Mapping[int, bytes] | Iterable[tuple[int, bytes]]) -> bytes:
    """Client number -> bytes, all of one width, as ``8 + width`` bytes an entry."""
    items = table.items() if isinstance(table, Mapping) else table
    return b"".join(n.to_bytes(NUMBER, "big", signed=True) + entry for n, entry in items)


def unpacked(payload: bytes, width: int) -> Table:
    """What :func:`packed` packed; :class:`ProtocolError` where the length does not fit ``width``."""
    step = NUMBER + width
    if len(payload) % step:
        raise ProtocolError(f"A list of {len(payload)} bytes is not made of entries of {step}; it was left out.")
    starts = range(0, len(payload), step)
    return [
        (int.from_bytes(payload[i : i + NUMBER], "big", signed=True), payload[i + NUMBER : i + step]) for i in starts
    ]


def distinct(table: Table, what: str) -> dict[int, bytes]:
    """The table as a mapping; :class:`ProtocolError` where it names a client twice."""
    found = dict(table)
    if len(found) < len(table):
        raise ProtocolError(f"The {what} names a client twice; each may be there once. It was refused.")
    return found


def frozen(kind: str, fields: Mapping[str, Any], rest: bytes = b"") -> bytes:
    """A party's state: one line of JSON, then ``rest``. Holds secrets: for this party's own store only."""
    return json.dumps({"fedlora.secure": kind, **fields}, default=_plain).encode() + b"\n" + rest


def thawed(kind: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    """What :func:`frozen` froze; ``ValueError`` where it is no state of this kind of party."""
    line, _, rest = data.partition(b"\n")
    try:
        fields = json.loads(line, object_hook=_revived)
    except ValueError as error:
        raise ValueError(f"{len(data)} bytes are no saved {kind}; give what to_bytes() returned.") from error
    if not isinstance(fields, dict) or fields.pop("fedlora.secure", None) != kind:
        raise ValueError(f"The saved state is of another kind of party; give what a {kind}'s to_bytes() returned.")
    return fields, rest


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(f"{type(value).__name__} is not part of a party's state")


def _revived(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["hex"]) if value.keys() == {"hex"} else value


def listed(table: Mapping[int, bytes]) -> list[tuple[int, bytes]]:
    """A table for :func:`frozen`: JSON's own mappings have text as keys."""
    return list(table.items())
