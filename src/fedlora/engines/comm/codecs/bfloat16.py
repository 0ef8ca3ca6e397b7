"""bfloat16: the range of float32 with 8 significant bits, two bytes a number."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Cast

LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class BFloat16(Cast):
    """The nearest number, at most the largest bfloat16. ``|x − x̂| ≤ 2⁻⁸ |x| + 2⁻¹³⁴``."""

    dtype = torch.bfloat16

    def encode(self, x, draws):
        return {"values": torch.where(x.isfinite(), x.clamp(-LARGEST, LARGEST), x).bfloat16()}

    def bound(self, x):
        return x.abs() * 2.0**-8 + 2.0**-134
