"""int4: two numbers a byte and a float32 scale a line, with stochastic rounding."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Quantized, from_lines, line_count

MIDDLE = 8


@dataclass(frozen=True)
class Int4(Quantized):
    """``x̂ = s q`` with ``s = max|line| / 7``, ``q`` from −7 to 7 and ``E x̂ = x``, as in int8.

    ``|x − x̂| ≤ s (1 + 2⁻¹⁶) + 2⁻¹¹⁹``. So coarse that only differences are encoded.
    """

    coarse = True
    levels = 7

    def form(self, shape):
        packed = (torch.Size(shape).numel() + 1) // 2
        return {"codes": ((packed,), torch.uint8), "scale": ((line_count(shape),), torch.float32)}

    def encode(self, x, draws):
        numbers, scale = self.quantize(x, draws)
        codes = (numbers.reshape(-1) + MIDDLE).to(torch.uint8)
        codes = torch.cat([codes, codes.new_full((len(codes) % 2,), MIDDLE)])
        return {"codes": codes[::2] * 16 + codes[1::2], "scale": scale}

    def decode(self, fields, shape):
        both = torch.stack([fields["codes"] // 16, fields["codes"] % 16], dim=-1).reshape(-1)
        codes = both[: torch.Size(shape).numel()].float() - MIDDLE
        return from_lines(codes.reshape(len(fields["scale"]), -1) * fields["scale"][:, None], shape)
