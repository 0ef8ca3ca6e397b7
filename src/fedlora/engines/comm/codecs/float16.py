"""float16: 11 significant bits, numbers up to 65504, two bytes a number."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Codec

LARGEST = 65504.0


@dataclass(frozen=True)
class Float16(Codec):
    """The nearest number. ``|x − x̂| ≤ 2⁻¹¹ |x| + 2⁻²⁵``; ``ValueError`` for numbers beyond 65504."""

    def form(self, shape):
        return {"values": (shape, torch.float16)}

    def encode(self, x, draws):
        most = float(torch.where(x.isfinite(), x, 0.0).abs().max())
        if most > LARGEST:
            raise ValueError(f"float16 ends at {LARGEST:g}, and {most:g} is to be sent; take bfloat16 instead.")
        return {"values": x.half()}

    def decode(self, fields, shape):
        return fields["values"].float()

    def bound(self, x):
        return x.abs() * 2.0**-11 + 2.0**-25
