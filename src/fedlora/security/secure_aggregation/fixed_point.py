"""Fixed-point encoding modulo 2^32, with which masks hide numbers perfectly and cancel exactly.

Bonawitz et al. Practical Secure Aggregation for Privacy-Preserving Machine Learning. CCS 2017, section 3.
https://doi.org/10.1145/3133956.3133982
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ring = NDArray[np.uint32]  # (d,), integers modulo 2^32
SLACK = 1e-6  # by which the cohort's shares may sum to more than one
CHUNK = 1 << 18  # numbers worked on at once, so that float64 copies stay small


@dataclass(frozen=True)
class FixedPoint:
    """Encodes ``x`` of a client with share ``w`` as ``round(w x 2^f) mod 2^32``, for ``|x| <= R``.

    The shares of the cohort sum to one, so the sum is at most ``R 2^f`` for any number of clients. ``f`` is the
    largest integer with ``R 2^f + K/2 < 2^31``, where ``K/2`` bounds the rounding.
    """

    range: float  # R
    clients: int  # K

    def __post_init__(self) -> None:
        if not 2.0**-64 <= self.range <= 2.0**30:
            raise ValueError(f"The range is {self.range}; take one from 2^-64 to 2^30.")

    @cached_property
    def bits(self) -> int:
        """``f``, the number of binary places."""
        room = (2**31 - self.clients / 2) / (self.range * (1 + SLACK))
        return math.ceil(math.log2(room)) - 1  # strictly below, also where room is a power of two

    def encode(self, values: Tensor, weight: float) -> Ring:
        """Encode ``values`` of any shape, times ``weight`` (the client's share), as (d,) integers of the ring.

        ``ValueError`` if a value is outside the range or not finite: clipping silently would train another model.
        """
        flat = values.detach().cpu().flatten()
        largest = max(abs(float(x)) for x in flat.aminmax())
        if not math.isfinite(largest):
            raise ValueError(
                f"The {len(flat)} values hold NaN or infinity; a sum of them would be worthless to all. "
                "Lower the learning rate, or leave this client out of the round."
            )
        if largest > self.range:
            raise ValueError(
                f"A value of size {largest:.6g} is outside the range of {self.range:g}; nothing is clipped in silence. "
                "Give the session a larger range, or send smaller updates."
            )
        out = np.empty(len(flat), np.uint32)
        for start in range(0, len(flat), CHUNK):
            chunk = slice(start, start + CHUNK)
            scaled = flat[chunk].double().numpy() * weight
            out[chunk] = np.rint(np.ldexp(scaled, self.bits)).astype(np.int32).view(np.uint32)
        return out

    def decode(self, total: Ring, weight: float) -> Tensor:
        """Return the weighted mean, float32 (d,), from the ring sum ``total`` and the sum of shares ``weight``."""
        out = np.empty(len(total), np.float32)
        for start in range(0, len(total), CHUNK):
            chunk = slice(start, start + CHUNK)
            out[chunk] = np.ldexp(total[chunk].view(np.int32).astype(np.float64), -self.bits) / weight
        return torch.from_numpy(out)

    def error_bound(self, weight: float, largest: float | None = None) -> float:
        """Return a bound of the error of each number of :meth:`decode`.

        ``K 2^-(f+1) / weight`` for the clients' rounding, and ``largest 2^-24`` for the float32 result, where
        ``largest`` is the largest absolute value of the mean, at most the range. The other terms are for float64.
        """
        largest = self.range if largest is None else largest
        return self.clients * math.ldexp(0.5 + 2.0**-22, -self.bits) / weight + largest * (2.0**-24 + 2.0**-51)
