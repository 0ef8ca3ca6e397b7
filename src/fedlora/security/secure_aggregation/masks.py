"""Masks: the keystream of ChaCha20 (RFC 8439) as integers modulo 2^32.

Bonawitz et al. 2017, section 4: client ``u`` sends ``x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)``.
The pairwise masks cancel in the sum; the self mask ``PRG(b_u)`` protects ``u`` if its pairwise masks become known.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from fedlora.security.secure_aggregation.fixed_point import Ring
from fedlora.security.secure_aggregation.keys import Address, KeyPair, derive

CHUNK = 1 << 15  # numbers; a chunk of the vector stays in the processor's cache while all masks are added to it
ZEROS = bytes(4 * CHUNK)

Mask = tuple[bytes, int]  # the keystream's key (32 bytes), and 1 to add or -1 to subtract it


def pairwise(session: bytes, number: int, own: KeyPair, peer: int, public: bytes) -> Mask:
    """The mask that client ``number`` shares with ``peer``, which uses the opposite sign."""
    first, second = sorted((number, peer))
    key = own.agree(public, Address(session, "pairwise mask", first, second))
    return key, 1 if number < peer else -1


def own(session: bytes, number: int, seed: bytes) -> Mask:
    """Client ``number``'s self mask, from its 32 random bytes."""
    return derive(seed, Address(session, "self mask", number, number).context()), 1


def commitment(session: bytes, number: int, seed: bytes) -> bytes:
    """32 bytes to verify a recovered ``seed`` with; they reveal nothing of the mask."""
    return derive(seed, Address(session, "commitment", number, number).context())


def opposite(masks: Iterable[Mask]) -> Iterator[Mask]:
    """The masks that cancel ``masks``."""
    return ((key, -sign) for key, sign in masks)


def add(vector: Ring, masks: Iterable[Mask]) -> None:
    """Add every mask to ``vector`` (d,), in place, with memory for one chunk."""
    # A key serves one session and one mask, so every keystream may begin at zero.
    streams = [(Cipher(ChaCha20(key, bytes(16)), None).encryptor(), sign) for key, sign in masks]
    buffer = np.empty(CHUNK, "<u4")
    for start in range(0, len(vector), CHUNK):
        chunk = vector[start : start + CHUNK]
        for stream, sign in streams:
            mask = buffer[: len(chunk)]
            stream.update_into(memoryview(ZEROS)[: mask.nbytes], mask.view(np.uint8).data)
            (np.add if sign > 0 else np.subtract)(chunk, mask, out=chunk)
