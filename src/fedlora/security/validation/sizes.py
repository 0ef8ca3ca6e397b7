"""How far an upload's leaves have moved, in one pass over them; and the norm of its update, where that is asked for."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.methods._base import Method
from fedlora.rounds import Rules, alike, batches, stacked
from fedlora.security.validation.expected import LARGEST, Checked, finite
from fedlora.security.validation.update_norms import change
from fedlora.types import Layer, Tree

BOUND = (LARGEST / 2) ** 2  # of a leaf's squared distance; below it, no number is beyond all bounds


class Moved(NamedTuple):
    """Squares of distances from where each leaf of one upload was served, part by part."""

    leaves: dict[str, float]  # of all leaves together
    sides: dict[str, tuple[float, float]]  # of the input and the output factors, for parts of which both came
    digest: str  # of the upload's numbers; empty where nothing has moved


class Origin:
    """Where uploads of one form have come from: what was served, leaves of one shape stacked together."""

    def __init__(self, rules: Rules, found: Checked):
        shaped = defaultdict[torch.Size, list[tuple[str, str]]](list)
        for part, layer in found.tree.items():
            for leaf, x in layer.items():
                shaped[x.shape].append((part, leaf))
        self.blocks = list(shaped.values())
        self.start = [_stacked(found.start, block) for block in self.blocks]
        self.parts, self.inputs, self.outputs = (defaultdict[str, list[int]](list) for _ in range(3))
        factors = {part: (rules[part].adapter.inputs, rules[part].adapter.outputs) for part in found.tree}
        for i, (part, leaf) in enumerate(place for block in self.blocks for place in block):
            inputs, outputs = factors[part]
            self.parts[part].append(i)
            if leaf in inputs:
                self.inputs[part].append(i)
            if leaf in outputs:
                self.outputs[part].append(i)
        self.pairs = sorted(self.inputs.keys() & self.outputs.keys())

    def distances(self, tree: Tree) -> tuple[list[float], str]:
        """The leaves' distances, block by block, and a digest of the upload's numbers.

        The digest is of the sum of each leaf's bits. Sums of the numbers would round a small difference away, and
        under sparsity any sample of places may be one in which no client has changed anything.
        """
        norms, digest = list[float](), hashlib.blake2b(digest_size=12)
        for block, start in zip(self.blocks, self.start):
            sent = _stacked(tree, block)
            bits = sent.view(torch.int32).sum(dim=1, dtype=torch.int32)
            digest.update(bits.cpu().numpy().tobytes())
            norms += torch.linalg.vector_norm(sent.sub_(start.to(sent.device)), dim=1).tolist()
        return norms, digest.hexdigest()


def _stacked(tree: Tree, block: Sequence[tuple[str, str]]) -> Tensor:
    """One leaf a row."""
    leaves = torch.stack([tree[part][leaf] for part, leaf in block]).detach().float()
    return leaves.unsqueeze(-1).flatten(1)  # a leaf can be one number


def moved(found: Checked, origin: Origin) -> Moved:
    """One upload's distances. ``RefusedError`` where a number in it is not finite or beyond all bounds."""
    norms, digest = origin.distances(found.tree)
    squares = [norm * norm for norm in norms]
    whole = sum(squares)
    if not whole <= BOUND:  # something may be no number, or too large
        for part, layer in found.tree.items():
            finite(part, layer)

    def over(leaves: Sequence[int]) -> float:
        return sum([squares[i] for i in leaves])

    leaves = {part: over(own) for part, own in origin.parts.items()}
    sides = {part: (over(origin.inputs[part]), over(origin.outputs[part])) for part in origin.pairs}
    return Moved(leaves, sides, digest if whole else "")


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
