"""bfloat16: float32's range with 8 significant bits, two bytes a number."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Codec

LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class BFloat16(Codec):
    """The nearest number. ``|x − x̂| ≤ 2⁻⁸ |x| + 2⁻¹³⁴``; what lies beyond the largest bfloat16 becomes that."""

    def form(self, shape):
        return {"values": (shape, torch.bfloat16)}

    def encode(self, x, draws):
        return {"values": torch.where(x.isfinite(), x.clamp(-LARGEST, LARGEST), x).bfloat16()}

    def decode(self, fields, shape):
        return fields["values"].float()

    def bound(self, x):
        return x.abs() * 2.0**-8 + 2.0**-134
