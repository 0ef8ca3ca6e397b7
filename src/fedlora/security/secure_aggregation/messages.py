"""The messages of the protocol, and the saved state of a client or server, as bytes.

They are tables of integers and sealed bytes rather than trees, so ``fedlora.files`` does not write them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedlora.security.secure_aggregation.session import ProtocolError

PHASES = ("advertise", "share", "mask", "unmask")  # messages of clients, in order
REPLIES = {"share": "peers", "mask": "inbox", "unmask": "survivors"}  # the server's message before each
NUMBER = 8  # bytes

Table = list[tuple[int, bytes]]  # entries of one width; a table from the wire may name a client twice


@dataclass(frozen=True)
class Message:
    """One sealed message. The seal also covers the header, so a change of it is detected."""

    phase: str
    sender: int
    receiver: int
    body: bytes = field(repr=False)

    def record(self) -> dict[str, Any]:
        """The message as text, integers and bytes; ``Message(**record)`` is its inverse."""
        return asdict(self)


def pack_table(table: Mapping[int, bytes] | Table) -> bytes:
    """Pack client number -> bytes of one width, as ``8 + width`` bytes an entry."""
    items = table.items() if isinstance(table, Mapping) else table
    return b"".join(n.to_bytes(NUMBER, "big", signed=True) + entry for n, entry in items)


def unpack_table(payload: bytes, width: int) -> Table:
    """Unpack the result of :func:`pack_table`; :class:`ProtocolError` if the length does not fit ``width``."""
    step = NUMBER + width
    if len(payload) % step:
        raise ProtocolError(f"A list of {len(payload)} bytes is not made of entries of {step}; it was left out.")
    entries = (payload[i : i + step] for i in range(0, len(payload), step))
    return [(int.from_bytes(entry[:NUMBER], "big", signed=True), entry[NUMBER:]) for entry in entries]


def as_mapping(table: Table, what: str) -> dict[int, bytes]:
    """Convert a table to a mapping; :class:`ProtocolError` if it names a client twice."""
    mapping = dict(table)
    if len(mapping) < len(table):
        raise ProtocolError(f"The {what} names a client twice; each may be there once. Refused.")
    return mapping


def save_state(kind: str, fields: Mapping[str, Any], rest: bytes = b"") -> bytes:
    """Encode a state as one line of JSON, then ``rest``. It has secrets: for the owner's own store."""
    return json.dumps({"fedlora.secure": kind, **fields}, default=_encode_bytes).encode() + b"\n" + rest


def load_state(kind: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    """Decode the result of :func:`save_state`; ``ValueError`` if it is no state of this kind."""
    line, _, rest = data.partition(b"\n")
    try:
        fields = json.loads(line, object_hook=lambda v: bytes.fromhex(v["hex"]) if v.keys() == {"hex"} else v)
    except ValueError as error:
        raise ValueError(f"{len(data)} bytes are no saved {kind}; give what to_bytes() returned.") from error
    if not isinstance(fields, dict) or fields.pop("fedlora.secure", None) != kind:
        raise ValueError(f"The saved state is of another kind; give what a {kind}'s to_bytes() returned.")
    return fields, rest


def _encode_bytes(value: object) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(f"{type(value).__name__} is not part of a saved state")
