"""int8: one byte a number and a float32 scale a line, rounded at random so that the mean is right."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Codec, drawn, from_lines, line_count, longest, steps

LEVELS = 127


@dataclass(frozen=True)
class Int8(Codec):
    """``x̂ = s q`` with ``s = max|line| / 127``; a line lies along the longest axis, so a LoRA factor has ``r`` scales.

    ``q`` is ``x / s`` rounded up with the probability of its fraction: ``E x̂ = x``. ``|x − x̂| ≤ s (1 + 2⁻¹⁶) +
    2⁻¹¹⁹``: one step, and what float32 rounds.
    """

    def form(self, shape):
        lines = line_count(shape)
        length = torch.Size(shape).numel() // max(1, lines)
        return {"codes": ((lines, length), torch.int8), "scale": ((lines,), torch.float32)}

    def encode(self, x, draws):
        scale = steps(x, LEVELS)
        return {"codes": drawn(x, scale, LEVELS, draws), "scale": scale}

    def decode(self, fields, shape):
        return from_lines(fields["codes"].float() * fields["scale"][:, None], shape)

    def bound(self, x):
        step = x.abs().amax(longest(tuple(x.shape)) if x.ndim else (), keepdim=bool(x.ndim)) / LEVELS
        return (step * (1 + 2.0**-16) + 2.0**-119).expand_as(x)
