"""int8: one byte a number and a float32 scale a line, with stochastic rounding."""

from dataclasses import dataclass

import torch

from fedlora.engines.comm.codecs._base import Quantized, from_lines, line_count


@dataclass(frozen=True)
class Int8(Quantized):
    """``x̂ = s q`` with ``s = max|line| / 127``; a line lies along the longest axis, so a LoRA factor has ``r`` scales.

    ``q`` is ``x / s`` rounded up with the probability of its fraction: ``E x̂ = x``. ``|x − x̂| ≤ s (1 + 2⁻¹⁶) + 2⁻¹¹⁹``.
    """

    levels = 127

    def form(self, shape):
        lines = line_count(shape)
        length = torch.Size(shape).numel() // max(1, lines)
        return {"codes": ((lines, length), torch.int8), "scale": ((lines,), torch.float32)}

    def encode(self, x, draws):
        codes, scale = self.quantize(x, draws)
        return {"codes": codes, "scale": scale}

    def decode(self, fields, shape):
        return from_lines(fields["codes"].float() * fields["scale"][:, None], shape)
