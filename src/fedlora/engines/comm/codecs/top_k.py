"""Top-k: the largest numbers and their positions; the others count as zero.

Stich et al. Sparsified SGD with Memory. NeurIPS 2018. https://arxiv.org/abs/1809.07599
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.engines.comm.codecs._base import Codec

BITS = 2 ** torch.arange(8)


@dataclass(frozen=True)
class TopK(Codec):
    """The ``⌈share n⌉`` numbers of largest absolute value, unchanged and in order; of equal ones, the first.

    Positions take an int32 each or, from a share of 1/32, a bit for every number. ``|x − x̂|`` is at most the absolute
    value of the ``k``-th largest for a number that is left out, and 0 for the others. Biased: use error feedback.
    """

    cite = """@inproceedings{stich2018sparsified, title = {Sparsified {SGD} with Memory}, author = {Stich and others},
      booktitle = {NeurIPS}, year = {2018}, eprint = {1809.07599}, archiveprefix = {arXiv}}"""

    share: float

    coarse = True
    inner_field = "values"

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"compression.top_k is {self.share}; it is the share that is kept, above 0 and below 1.")

    def form(self, shape):
        n = torch.Size(shape).numel()
        k, bits = self._count(n), (n + 7) // 8
        positions = {"index": ((k,), torch.int32)} if 4 * k < bits else {"bits": ((bits,), torch.uint8)}
        return {**positions, "values": ((k,), torch.float32)}

    def encode(self, x, draws):
        flat = x.reshape(-1)
        mask = self._top_mask(flat)
        if "index" in self.form(tuple(x.shape)):
            return {"index": mask.nonzero()[:, 0].to(torch.int32), "values": flat[mask]}
        padded = torch.cat([mask, mask.new_zeros(-len(mask) % 8)]).reshape(-1, 8)
        return {"bits": (padded * BITS).sum(-1).to(torch.uint8), "values": flat[mask]}

    def decode(self, fields, shape):
        n = torch.Size(shape).numel()
        if "index" in fields:
            index = fields["index"].long()
            if not bool((index >= 0).all() & (index < n).all() & (index.diff() > 0).all()):
                raise ValueError("the positions of a top-k leaf do not rise from 0 to its size")
        else:
            bits = (fields["bits"][:, None].long() & BITS).bool().reshape(-1)
            index = bits.nonzero()[:, 0]
            if len(index) != self._count(n) or bool(bits[n:].any()):
                raise ValueError(f"a top-k leaf marks {len(index)} positions, not {self._count(n)}")
        return torch.zeros(n).index_put((index,), fields["values"]).reshape(shape)

    def bound(self, x):
        mask = self._top_mask(x.reshape(-1)).reshape(x.shape)
        return torch.where(mask, 0.0, x.abs()[mask].min())

    def _count(self, n: int) -> int:
        return max(1, math.ceil(self.share * n))

    def _top_mask(self, flat: Tensor) -> Tensor:
        """Mark the numbers that are kept; NaN counts as largest, so that the receiver sees it."""
        size, k = flat.abs().nan_to_num(nan=float("inf"), posinf=float("inf")), self._count(len(flat))
        least = size.kthvalue(len(flat) - k + 1).values
        above, equal = size > least, size == least
        return above | (equal & (equal.cumsum(0) <= k - above.sum()))
