"""Every draw of a run comes from one number: ``derived`` names the draw and gives it a seed of its own."""

import hashlib


def derive_seed(seed: int, *labels: str | int) -> int:
    """A seed in ``[0, 2**63)`` that depends on ``seed`` and on what it is for, and on nothing else.

    Neighbouring seeds give unrelated streams, and adding a draw in one place moves no other.
    """
    name = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
