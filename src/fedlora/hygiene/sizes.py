"""How far an upload's leaves have moved, in one pass over them; and the norm of its update, where that is asked for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
    sent = [x for layer in found.tree.values() for x in layer.values()]
    if not sent:
        return Moved({}, {})
    start = [found.start[part][leaf] for part, layer in found.tree.items() for leaf in layer]
    if start[0].device != sent[0].device:
        start = [x.to(sent[0].device) for x in start]
    norms = torch.stack(torch._foreach_norm(torch._foreach_sub(sent, start))).tolist()
    squares = [x * x for x in norms]
    if not sum(squares) <= BOUND:  # something may be no number, or too large
        for part, layer in found.tree.items():
            finite(part, layer)
    return _by_part(rules, found.tree, iter(squares))


def _by_part(rules: Rules, tree: Tree, squares: Iterator[float]) -> Moved:
    """The squares of all leaves, in order, summed for each part and for each of its sides that came."""
    leaves: dict[str, float] = {}
    sides: dict[str, tuple[float, float]] = {}
    known: dict[int, tuple[frozenset[str], frozenset[str]]] = {}  # an adapter makes its sets anew when asked
    for part, layer in tree.items():
        adapter = rules[part].adapter
        inputs, outputs = known.get(id(adapter)) or known.setdefault(id(adapter), (adapter.inputs, adapter.outputs))
        own = [(leaf, next(squares)) for leaf in layer]
        if own:
            leaves[part] = sum([x for _, x in own])
        into, out = [x for leaf, x in own if leaf in inputs], [x for leaf, x in own if leaf in outputs]
        if into and out:
            sides[part] = sum(into), sum(out)
    return Moved(leaves, sides)


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
