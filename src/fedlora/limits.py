"""What comes from another party is looked at before anything is made of it: sizes, headers, names.

``read_header`` is the one reader of safetensors headers. It reads the eight bytes that say how long the header is, then
the header, and checks both against the file before a tensor is made; nothing of a pickle is ever read.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

SIZES = {  # bytes a number, by safetensors' names of dtypes
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
DIMENSIONS = 8
NAME = 512  # characters of a tensor's name
METADATA = "__metadata__"
SAID = 400  # characters of what another party says that are shown
NO_FILE = re.compile(r"[/\\]|\.\.|^[.~]|^$|^.{129}")  # what a name may not have, if it becomes a file's


class RefusedHeaderError(ValueError):
    """A file or message whose header is not what it should be; the text says what was found, without a full stop."""


@dataclass(frozen=True)
class Limits:
    """How much of a file or message is taken in. The defaults are for files that a user names."""

    size: int = 2**36  # bytes of the whole
    tensors: int = 100_000
    header: int = 2**25  # bytes


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A header that fits its file: each tensor's dtype and shape, and the notes beside them."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


FILES = Limits()


def upload_limits(megabytes: float) -> Limits:
    """For one message of a party."""
    return Limits(int(megabytes * 1e6), 20_000, 2**22)


def read_header(source: str | Path | bytes, limits: Limits = FILES) -> Header:
    """The header of a safetensors file, or of the bytes of one, checked against the limits and its own size.

    Raises ``RefusedHeaderError`` where size, header, names, dtypes, shapes or offsets are not in order, and ``OSError``
    where there is no such file. At most the header is held in memory.
    """
    if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise RefusedHeaderError("it is no file")  # reading a pipe would wait for ever
    if isinstance(source, bytes):
        return _parsed(source[8 : 8 + _header_size(source[:8], len(source), limits)], len(source), limits)
    with open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _parsed(_exactly(file, _header_size(_exactly(file, 8, size), size, limits), size), size, limits)


def _exactly(file: BinaryIO, count: int, size: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise RefusedHeaderError(f"it ends within its header, after {size} bytes")
    return found


def _header_size(start: bytes, size: int, limits: Limits) -> int:
    if size > limits.size:
        raise RefusedHeaderError(f"it has {size} bytes, and {limits.size} are the most that is taken")
    if len(start) < 8:
        raise RefusedHeaderError(f"it ends within its header, after {size} bytes")
    length = int.from_bytes(start, "little")
    if length > limits.header:
        raise RefusedHeaderError(f"its header claims {length} bytes, and {limits.header} are the most that is taken")
    if length > size - 8 or length < 2:
        raise RefusedHeaderError(f"its header claims {length} bytes of {size}")
    return length


def _parsed(text: bytes, size: int, limits: Limits) -> Header:
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, RefusedHeaderError) else f"its header is no JSON ({type(error).__name__})"
        raise RefusedHeaderError(why) from error
    if not isinstance(found, dict):
        raise RefusedHeaderError("its header is no table of tensors")
    notes = found.pop(METADATA, {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise RefusedHeaderError("its notes are no texts")
    if len(found) > limits.tensors:
        raise RefusedHeaderError(f"it holds {len(found)} tensors, and {limits.tensors} are the most that is taken")
    spans = [_span(name, told) for name, told in found.items()]
    _covers(spans, size - 8 - len(text))
    return Header({name: Entry(told["dtype"], tuple(told["shape"])) for name, told in found.items()}, notes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedHeaderError("its header has a name twice")
    return found


def _span(name: str, told: Any) -> tuple[int, int]:
    """Where a tensor lies, if its name, dtype and shape are in order and fit that."""
    if not 0 < len(name) <= NAME or not name.isprintable():
        raise RefusedHeaderError(f"it names a tensor {shown(name, 60)!r}, which is no plain name")
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise RefusedHeaderError(f"its entry {name!r} is no tensor")
    shape, span = (_counts(name, told[key]) for key in ("shape", "data_offsets"))
    width = SIZES.get(told["dtype"]) if isinstance(told["dtype"], str) else None
    if width is None or len(shape) > DIMENSIONS or len(span) != 2:
        raise RefusedHeaderError(f"its entry {name!r} has no usual dtype, shape and offsets")
    for count in shape:
        width *= count
    if span[1] - span[0] != width:
        raise RefusedHeaderError(f"its tensor {name!r} claims {width} bytes and has {span[1] - span[0]}")
    return span[0], span[1]


def _counts(name: str, told: Any) -> list[int]:
    if not isinstance(told, list) or not all(type(x) is int and 0 <= x < 2**48 for x in told):
        raise RefusedHeaderError(f"its entry {name!r} has sizes that are no counts")
    return told


def _covers(spans: list[tuple[int, int]], size: int) -> None:
    """The tensors lie one after the other, without gaps, and fill the file."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise RefusedHeaderError("its tensors overlap, or leave gaps")
        at = end
    if at != size:
        raise RefusedHeaderError(f"its tensors end after {at} of {size} bytes; it is cut off, or longer than it says")


def shown(text: object, most: int = SAID) -> str:
    """What another party said, fit for a log or a terminal: no control characters, no escapes, and not endless."""
    found = str(text)
    cut = found[:most] + ("..." if len(found) > most else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def plain_name(name: str, what: str) -> str:
    """A name that may become a file's or a folder's. ``ValueError`` where it could lead elsewhere."""
    if NO_FILE.search(name) or not name.isprintable():
        raise ValueError(
            f"{what} is named {shown(name, 60)!r}, and the name becomes a folder's; write it without slashes, without "
            "'..' and without control characters."
        )
    return name
