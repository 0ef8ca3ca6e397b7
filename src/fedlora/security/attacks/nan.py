"""What is no number: a crash, or the crudest attack there is."""

from dataclasses import dataclass

import torch

from fedlora.security.attacks._base import Attack


@dataclass(frozen=True)
class NotANumber(Attack):
    """The first number of every leaf is NaN."""

    def sends(self, rules, start, sent, turn):
        """The upload with a NaN in every leaf."""
        return {part: {leaf: _spoilt(x) for leaf, x in layer.items()} for part, layer in sent.items()}


def _spoilt(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1)
    return torch.cat([torch.full_like(flat[:1], torch.nan), flat[1:]]).reshape(x.shape)
