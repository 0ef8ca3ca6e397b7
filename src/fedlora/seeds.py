"""All random draws of a run come from one seed: ``derive_seed`` gives each named draw its own seed."""

import hashlib


def derive_seed(seed: int, *labels: str | int) -> int:
    """Return a seed in ``[0, 2**63)`` that depends only on ``seed`` and the labels.

    Neighbouring seeds give unrelated streams, and a new draw in one place changes no other draw.
    """
    name = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
