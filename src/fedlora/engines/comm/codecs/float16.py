"""float16: 11 significant bits, numbers up to 65504, two bytes a number."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Cast

LARGEST = 65504.0


@dataclass(frozen=True)
class Float16(Cast):
    """The nearest number; ``ValueError`` for numbers beyond 65504. ``|x − x̂| ≤ 2⁻¹¹ |x| + 2⁻²⁵``."""

    dtype = torch.float16

    def encode(self, x, draws):
        largest = float(torch.where(x.isfinite(), x, 0.0).abs().max())
        if largest > LARGEST:
            raise ValueError(f"float16 ends at {LARGEST:g}, and a leaf has {largest:g}; take bfloat16 instead.")
        return {"values": x.half()}

    def bound(self, x):
        return x.abs() * 2.0**-11 + 2.0**-25
