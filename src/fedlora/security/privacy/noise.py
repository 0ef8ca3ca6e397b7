"""Random draws for privacy, from one key and a name for each draw.

SHAKE-256 of key and name gives the bits, so without the key the draws look random. A round that is repeated gets the
same noise: different noise would be a second release. Every client can compute the key of ``config.seed``, since each
has the configuration; it is for research. A secret key is 32 random bytes of the operating system.
"""

import hashlib
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

BITS = 53  # of a float64's mantissa


def key_of(seed: int | None) -> bytes:
    """Return a key of 32 bytes, from the run's seed or (None) secret."""
    return os.urandom(32) if seed is None else hashlib.sha256(f"privacy/{seed}".encode()).digest()


@dataclass(frozen=True)
class Stream:
    """Draws by name. The same key and name give the same numbers in every engine."""

    key: bytes = field(repr=False)

    def uniform(self, count: int, *name: str | int) -> Tensor:
        """Draw (count,) float64 numbers, strictly between 0 and 1."""
        label = "/".join(map(str, name)).encode()
        bits = hashlib.shake_256(self.key + b"/" + label).digest(8 * count)
        whole = torch.frombuffer(bytearray(bits), dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
        return ((whole >> 11 & (1 << BITS) - 1).double() + 0.5) / 2**BITS

    def normal(self, shape: torch.Size, *name: str | int) -> Tensor:
        """Draw standard normal float64 numbers on the CPU; they end at 8.2, which changes δ by less than 1e-15."""
        return torch.special.ndtri(self.uniform(shape.numel(), *name)).reshape(shape)

    def sample(self, count: int, rate: float, *name: str | int) -> Tensor:
        """Draw a Poisson sample of the numbers below ``count``: each independently with probability ``rate``."""
        return (self.uniform(count, *name) < rate).nonzero()[:, 0]

    def child(self, *name: str | int) -> "Stream":
        """Return a stream that is independent of this one, such as a client's."""
        return Stream(hashlib.sha256(self.key + b"/of/" + "/".join(map(str, name)).encode()).digest())

    @property
    def seed(self) -> int:
        """A seed in ``[0, 2**63)`` for other draws, such as a cohort's."""
        return int.from_bytes(hashlib.sha256(self.key + b"/seed").digest()[:8], "big") >> 1
