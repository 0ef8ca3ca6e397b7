"""int4: two numbers a byte and a float32 scale a line, rounded at random so that the mean is right."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Codec, drawn, from_lines, line_count, longest, steps

LEVELS, MIDDLE = 7, 8


@dataclass(frozen=True)
class Int4(Codec):
    """``x̂ = s q`` with ``s = max|line| / 7`` and ``q`` from −7 to 7; a line lies along the longest axis.

    ``q`` is ``x / s`` rounded up with the probability of its fraction: ``E x̂ = x``. ``|x − x̂| ≤ s (1 + 2⁻¹⁶) +
    2⁻¹¹⁹``: one step, and what float32 rounds. So coarse that only differences are encoded.
    """

    coarse = True

    def form(self, shape):
        packed = (torch.Size(shape).numel() + 1) // 2
        return {"codes": ((packed,), torch.uint8), "scale": ((line_count(shape),), torch.float32)}

    def encode(self, x, draws):
        scale = steps(x, LEVELS)
        codes = (drawn(x, scale, LEVELS, draws).reshape(-1) + MIDDLE).to(torch.uint8)
        codes = torch.cat([codes, codes.new_full((len(codes) % 2,), MIDDLE)])
        return {"codes": codes[::2] * 16 + codes[1::2], "scale": scale}

    def decode(self, fields, shape):
        both = torch.stack([fields["codes"] // 16, fields["codes"] % 16], dim=-1).reshape(-1)
        codes = both[: torch.Size(shape).numel()].float() - MIDDLE
        return from_lines(codes.reshape(len(fields["scale"]), -1) * fields["scale"][:, None], shape)

    def bound(self, x):
        step = x.abs().amax(longest(tuple(x.shape)) if x.ndim else (), keepdim=bool(x.ndim)) / LEVELS
        return (step * (1 + 2.0**-16) + 2.0**-119).expand_as(x)
