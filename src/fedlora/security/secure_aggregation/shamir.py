"""Shamir's secret sharing: any ``t`` of ``n`` shares give the secret, and fewer reveal nothing.

Shamir. How to Share a Secret. Communications of the ACM 22(11), 1979. https://doi.org/10.1145/359168.359176
Bonawitz et al. 2017, section 3: shares of the key and of the self mask's seed.
"""

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedlora.security.secure_aggregation.session import ProtocolError

PRIME = 2**256 + 297  # the smallest above 2^256, so that every 32 bytes are an element of the field
SECRET, SHARE = 32, 33  # bytes


def split(secret: bytes, numbers: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Split the 32-byte ``secret`` into 33-byte shares, one a number; ``threshold`` of them give it back."""
    if len(secret) != SECRET or not 1 <= threshold <= len(set(numbers)) == len(numbers):
        raise ValueError(
            f"A secret of {len(secret)} bytes for {len(numbers)} holders and a threshold of {threshold} was given; "
            f"take {SECRET} bytes, holders that differ, and a threshold from 1 to their number."
        )
    rest = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    polynomial = [int.from_bytes(secret, "big"), *rest]
    return {n: evaluate(polynomial, n + 1).to_bytes(SHARE, "big") for n in numbers}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Recover the secret from exactly ``threshold`` shares, holder -> share.

    :class:`ProtocolError` for another count, or if the shares cannot be of one 32-byte secret.
    """
    if len(shares) != threshold:
        raise ProtocolError(f"{len(shares)} shares were given; a secret is put together from exactly {threshold}.")
    points = tuple(n + 1 for n in shares)
    values = [int.from_bytes(share, "big") for share in shares.values()]
    secret = sum(c * y for c, y in zip(lagrange_at_zero(points), values, strict=True)) % PRIME
    if secret >= 2**256:
        raise ProtocolError("The shares do not belong to one secret; one of them was made or sent wrongly.")
    return secret.to_bytes(SECRET, "big")


def evaluate(polynomial: Sequence[int], x: int, prime: int = PRIME) -> int:
    """Evaluate ``polynomial`` (the constant first) at ``x`` modulo ``prime``, by Horner's rule."""
    y = 0
    for coefficient in reversed(polynomial):
        y = (y * x + coefficient) % prime
    return y


@lru_cache(maxsize=64)
def lagrange_at_zero(points: tuple[int, ...], prime: int = PRIME) -> tuple[int, ...]:
    """Lagrange coefficients: the weights of the values at ``points`` in the value at 0, modulo ``prime``."""
    coefficients = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above, below = above * other % prime, below * (other - x) % prime
        coefficients.append(above * pow(below, -1, prime) % prime)
    return tuple(coefficients)
