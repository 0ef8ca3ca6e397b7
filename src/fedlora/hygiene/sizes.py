"""How far an upload's leaves have moved, in one pass over them; and the norm of its update, where that is asked for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.adapters import Adapter
from fedlora.forms import LARGEST, Checked, finite
from fedlora.method import Method
from fedlora.rounds import Rules, alike, batches, stacked
from fedlora.types import Layer, Tree
from fedlora.updates import change

BOUND = (LARGEST / 2) ** 2  # of a leaf's squared distance; below it, no number is beyond all bounds


class Moved(NamedTuple):
    """Squares of distances from where each leaf of one upload was served, part by part."""

    leaves: dict[str, float]  # of all leaves together
    sides: dict[str, tuple[float, float]]  # of the input and the output factors, for parts of which both came


def moved(rules: Rules, found: Checked) -> Moved:
    """One upload's distances. ``RefusedError`` where a number in it is not finite or beyond all bounds."""
    keys = [(part, leaf) for part, layer in found.tree.items() for leaf in layer]
    if not keys:
        return Moved({}, {})
    sent = [found.tree[part][leaf] for part, leaf in keys]
    start = [found.start[part][leaf].to(x.device) for (part, leaf), x in zip(keys, sent)]
    squares = torch.stack(torch._foreach_norm(torch._foreach_sub(sent, start))).double().square().tolist()
    by_part: dict[str, dict[str, float]] = {}
    for (part, leaf), square in zip(keys, squares):
        by_part.setdefault(part, {})[leaf] = square
        if not square <= BOUND:  # not a number, or one that is too large
            finite(part, found.tree[part])
    sides = {part: _sides(rules[part].adapter, own) for part, own in by_part.items()}
    return Moved(
        {part: sum(own.values()) for part, own in by_part.items()},
        {part: (both[0], both[1]) for part, both in sides.items() if len(both) == 2},
    )


def _sides(adapter: Adapter, squares: Mapping[str, float]) -> list[float]:
    """Input and output, or nothing where one of them did not come."""
    both = [[squares[leaf] for leaf in squares.keys() & side] for side in (adapter.inputs, adapter.outputs)]
    return [sum(values) for values in both] if all(both) else []


def served(rules: Rules, start: Tree, parts: Iterable[str], side: int) -> float:
    """The norm of the factors of one side as they were served."""
    layers = ((start[p], (rules[p].adapter.inputs, rules[p].adapter.outputs)[side]) for p in parts)
    return float(sum(float(layer[leaf].double().square().sum()) for layer, leaves in layers for leaf in leaves) ** 0.5)


def norm(rules: Rules, start: Tree, products: frozenset[str], tree: Tree, away: Moved) -> float:
    """``‖D‖`` over the whole model.

    Where nothing but the inside of fixed factors is trained, the update is linear in the leaves: their distance is a
    norm of it, and the same one where the fixed factors are orthonormal.
    """
    square = 0.0
    for rule in dict.fromkeys(rules.values()):
        parts = [part for part in rules if rules[part] == rule and part in away.leaves]
        if not rule.adapter.inputs or not products.issuperset(parts):
            square += sum(away.leaves[part] for part in parts)
            continue
        sent = {part: tree[part] for part in parts}
        for group in alike(parts, lambda part, sent=sent: [sent[part]]):  # type: ignore[misc]
            for some in batches(group, sum(x.numel() for x in sent[group[0]].values())):
                square += _square(rule, [start[part] for part in some], [sent[part] for part in some])
    return float(square**0.5)


def _square(rule: Method, starts: Sequence[Layer], layers: Sequence[Layer]) -> float:
    """Of parts of one shape together, from two small Gram matrices a part."""
    sent = stacked(layers)
    start: dict[str, Tensor] = {leaf: x.to(next(iter(sent.values())).device) for leaf, x in stacked(starts).items()}
    U, V = change(rule.adapter, start, {**start, **sent})
    return float(((U.mT @ U).double() * (V @ V.mT).double()).sum().clamp_min(0))
