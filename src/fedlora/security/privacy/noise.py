"""Where the randomness of privacy comes from: one key, and a name for every draw.

SHAKE-256 of key and name gives the bits, so who does not know the key cannot tell the draws from coin tosses, and a
round that is asked for twice gets the same noise both times: two different ones would be two releases. A key made of
``config.seed`` is known to every party, since each holds the configuration: that is for research. A secret key is 32
bytes of the operating system.
"""

import hashlib
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

BITS = 53  # of a float64's mantissa


def key_of(seed: int | None) -> bytes:
    """A key of 32 bytes: from the run's seed, or secret (None)."""
    return os.urandom(32) if seed is None else hashlib.sha256(f"privacy/{seed}".encode()).digest()


@dataclass(frozen=True)
class Stream:
    """Draws by name. The same key and name give the same numbers, on every engine."""

    key: bytes = field(repr=False)

    def uniform(self, count: int, *name: str | int) -> Tensor:
        """(count,) float64, strictly between 0 and 1."""
        label = "/".join(map(str, name)).encode()
        bits = hashlib.shake_256(self.key + b"/" + label).digest(8 * count)
        whole = torch.frombuffer(bytearray(bits), dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
        return ((whole >> 11 & (1 << BITS) - 1).double() + 0.5) / 2**BITS

    def normal(self, shape: torch.Size, *name: str | int) -> Tensor:
        """Standard normal draws, float64 on the CPU; none is larger than 8.2, which changes δ by less than 1e-15."""
        return torch.special.ndtri(self.uniform(shape.numel(), *name)).reshape(shape)

    def chosen(self, count: int, rate: float, *name: str | int) -> Tensor:
        """The numbers below ``count`` that a Poisson sample holds: each by itself with probability ``rate``."""
        return (self.uniform(count, *name) < rate).nonzero()[:, 0]

    def of(self, *name: str | int) -> "Stream":
        """A stream of somebody's own: its draws are none of this one's."""
        return Stream(hashlib.sha256(self.key + b"/of/" + "/".join(map(str, name)).encode()).digest())

    @property
    def seed(self) -> int:
        """A seed in ``[0, 2**63)`` for draws that are not of noise, such as a cohort's."""
        return int.from_bytes(hashlib.sha256(self.key + b"/seed").digest()[:8], "big") >> 1
