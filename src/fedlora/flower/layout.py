"""Which leaves a client sends in a round, and with which shapes: known before it has trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora.files import flatten, unflatten
from fedlora.rounds import Rules
from fedlora.security.validation.expected import expected
from fedlora.types import Tree, Turn

Layout = Mapping[str, tuple[int, ...]]  # ``part/leaf`` -> shape


def layout_of(rules: Rules, shared: Tree, turns: Sequence[Turn]) -> Layout:
    """Every leaf that a client of these turns may send."""
    found: dict[str, tuple[int, ...]] = {}
    for turn in turns:
        sent = expected(rules, shared, turn).sent
        found |= {name: tuple(x.shape) for name, x in flatten(sent).items()}
    return found


def vector(layout: Layout, sent: Tree) -> Tensor:
    """``(d,)`` float32: every leaf's numbers in the layout's order, then a one for each leaf that was sent."""
    own = {name: x.float() for name, x in flatten(sent).items()}
    strange = [name for name, x in own.items() if layout.get(name) != tuple(x.shape)]
    if strange:
        raise ValueError(f"this party would send {strange[0]!r}, which is not in the round's layout.")
    values = [own.get(name, torch.zeros(shape)).cpu().reshape(-1) for name, shape in layout.items()]
    return torch.cat([*values, torch.tensor([float(name in own) for name in layout])])


def size(layout: Layout) -> int:
    """``d``: how long the vector is."""
    return sum(torch.Size(shape).numel() + 1 for shape in layout.values())


def means(layout: Layout, mean: Tensor, least: float) -> Tree:
    """Each leaf's mean over those who sent it, of the mean of all vectors; without leaves that nobody sent.

    ``least`` is the smallest share that a client can have in that mean.
    """
    there = mean[mean.numel() - len(layout) :]
    leaves: dict[str, Tensor] = {}
    at = 0
    for (name, shape), present in zip(layout.items(), there.tolist()):
        numbers = torch.Size(shape).numel()
        if present > least / 2:
            everyone = abs(present - 1) < 1e-6
            leaves[name] = mean[at : at + numbers].reshape(shape) / (1.0 if everyone else present)
        at += numbers
    return unflatten(leaves)
