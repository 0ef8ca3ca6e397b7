"""NaN: an upload with numbers that are not finite, as after a crash or by the simplest attack."""

from dataclasses import dataclass

import torch

from fedlora.security.attacks._base import Attack


@dataclass(frozen=True)
class NotANumber(Attack):
    """Sets the first number of every leaf to NaN."""

    def alter(self, rules, start, sent, turn):
        forged: dict[str, dict[str, torch.Tensor]] = {part: {} for part in sent}
        for part, layer in sent.items():
            for leaf, x in layer.items():
                flat = x.reshape(-1)
                forged[part][leaf] = torch.cat([torch.full_like(flat[:1], torch.nan), flat[1:]]).reshape(x.shape)
        return forged
