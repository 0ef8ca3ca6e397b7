"""Bytes made wrong in the ways that bytes go wrong: flipped, cut, doubled, swapped, with other numbers in them."""

import random
import re
from collections.abc import Sequence

NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"255",
    b"65536",
    b"4294967296",
    b"18446744073709551616",
    b"1e999",
    b"0.5",
    b"nan",
    b"9" * 40,
]
PIECES = [b"\0", b"\xff" * 8, b"\x1b[31m", b"../", b"[" * 50, b'"', b"{", b"}", b",", b"null", b"true", b"F32", b"OBJ",
          b"@codes", b"@shape", b"_residual.", b"__metadata__", b"\r\n", "é\u202e".encode()]  # fmt: skip


def mutated(corpus: Sequence[bytes], draws: random.Random) -> bytes:
    """One of the corpus after one to four changes."""
    data = bytearray(draws.choice(corpus))
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        draws.choice(CHANGES)(data, corpus, draws)
    return bytes(data)


def _place(data: bytearray, draws: random.Random) -> int:
    """Mostly near the beginning, where headers are."""
    most = len(data) if draws.random() < 0.5 else min(len(data), 400)
    return draws.randrange(most) if most else 0


def _flip(data, corpus, draws):
    if data:
        data[_place(data, draws)] ^= 1 << draws.randrange(8)


def _other(data, corpus, draws):
    if data:
        data[_place(data, draws)] = draws.randrange(256)


def _cut(data, corpus, draws):
    del data[_place(data, draws) :]


def _drop(data, corpus, draws):
    at = _place(data, draws)
    del data[at : at + draws.randrange(1, 9)]


def _double(data, corpus, draws):
    at = _place(data, draws)
    data[at:at] = data[at : at + draws.randrange(1, 40)]


def _insert(data, corpus, draws):
    at = _place(data, draws)
    data[at:at] = draws.choice(PIECES)


def _number(data, corpus, draws):
    found = list(re.finditer(rb"\d+", bytes(data[:4000])))
    if found:
        span = draws.choice(found).span()
        data[slice(*span)] = draws.choice(NUMBERS)


def _length(data, corpus, draws):
    """The eight bytes that say how long a safetensors header is."""
    value = draws.choice([0, 1, 7, len(data), len(data) - 8, 2**16, 2**32, 2**63, 2**64 - 1, draws.randrange(2**10)])
    data[:8] = max(0, value).to_bytes(8, "little")


def _header(data, corpus, draws):
    """A change within the header with its length set right again, so that the change itself is looked at."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or not 2 <= size <= len(data) - 8:
        return
    header, rest = bytearray(data[8 : 8 + size]), bytes(data[8 + size :])
    draws.choice((_flip, _other, _drop, _double, _insert, _number, _number))(header, corpus, draws)
    data[:] = len(header).to_bytes(8, "little") + header + rest


def _spliced(data, corpus, draws):
    other = draws.choice(corpus)
    data[_place(data, draws) :] = other[_place(bytearray(other), draws) :]


CHANGES = [_flip, _other, _cut, _drop, _double, _insert, _number, _length, _header, _header, _header, _spliced]
