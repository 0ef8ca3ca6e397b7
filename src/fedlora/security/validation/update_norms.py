"""Norms of one upload's update, and the inner products of all updates of a round.

An update is the change of the product, ``D_k = s B_k A_k − s B A``, so norms, distances and angles of updates do not
depend on the frame of the factors (see ``linalg.geometry``). Parts that are trained in full, and leaves whose other
factor stays with the client, count with the change of their own numbers: the server's result is linear in these.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapters import Adapter
from fedlora.linalg.geometry import difference, inner_products, squared_norm
from fedlora.rounds import Received, Rules, group_by_shape, split_group, stack_layers
from fedlora.security.validation.expected import LARGEST, CheckedUpload, UploadSpecs, check_finite, check_upload
from fedlora.types import Factors, Layer, Tree

BOUND = (LARGEST / 2) ** 2  # of a leaf's squared distance; below it, no number of the leaf is too large


class Movement(NamedTuple):
    """Squared distances of an upload's leaves from the leaves that were served, by part."""

    leaves: dict[str, float]  # of all leaves together
    sides: dict[str, tuple[float, float]]  # of the input and the output factors, for parts that sent both
    digest: str  # of the upload's numbers; empty if nothing has moved


class ServedLeaves:
    """The leaves that uploads of one form started from, with leaves of one shape stacked together."""

    def __init__(self, rules: Rules, upload: CheckedUpload):
        by_shape = defaultdict[torch.Size, list[tuple[str, str]]](list)
        for part, layer in upload.tree.items():
            for leaf, x in layer.items():
                by_shape[x.shape].append((part, leaf))
        self.blocks = list(by_shape.values())
        self.start = [_rows(upload.start, block) for block in self.blocks]
        self.parts, self.inputs, self.outputs = (defaultdict[str, list[int]](list) for _ in range(3))
        adapters = {part: rules[part].adapter for part in upload.tree}
        sides = {part: ((self.inputs, a.inputs), (self.outputs, a.outputs)) for part, a in adapters.items()}
        for i, (part, leaf) in enumerate(place for block in self.blocks for place in block):
            self.parts[part].append(i)
            for positions, factors in sides[part]:
                if leaf in factors:
                    positions[part].append(i)
        self.pairs = sorted(self.inputs.keys() & self.outputs.keys())

    def distances(self, tree: Tree) -> tuple[list[float], str]:
        """Return the distance of each leaf, block by block, and a digest of the upload's numbers.

        The digest is of the sum of each leaf's bits. A sum of the numbers would round a small difference away, and
        with sparse updates, a sample of positions may hold no change of any client.
        """
        norms, digest = list[float](), hashlib.blake2b(digest_size=12)
        for block, start in zip(self.blocks, self.start):
            sent = _rows(tree, block)
            bits = sent.view(torch.int32).sum(dim=1, dtype=torch.int32)
            digest.update(bits.cpu().numpy().tobytes())
            norms += torch.linalg.vector_norm(sent.sub_(start.to(sent.device)), dim=1).tolist()
        return norms, digest.hexdigest()


def _rows(tree: Tree, block: Sequence[tuple[str, str]]) -> Tensor:
    """Stack leaves of one shape, one leaf a row."""
    leaves = torch.stack([tree[part][leaf] for part, leaf in block]).detach().float()
    return leaves.unsqueeze(-1).flatten(1)  # a leaf can be one number


def measure_movement(upload: CheckedUpload, served: ServedLeaves) -> Movement:
    """Measure an upload's distances in one pass. ``RefusedError`` if a number in it is not finite or too large."""
    norms, digest = served.distances(upload.tree)
    squares = [norm * norm for norm in norms]
    whole = sum(squares)
    if not whole <= BOUND:  # a number may be not finite or too large
        for part, layer in upload.tree.items():
            check_finite(part, layer)

    def total(leaves: Sequence[int]) -> float:
        return sum([squares[i] for i in leaves])

    leaves = {part: total(positions) for part, positions in served.parts.items()}
    sides = {part: (total(served.inputs[part]), total(served.outputs[part])) for part in served.pairs}
    return Movement(leaves, sides, digest if whole else "")


def served_norm(rules: Rules, start: Tree, parts: Iterable[str], side: int) -> float:
    """Compute the norm of the served factors of one side (0: input, 1: output)."""
    layers = ((start[p], (rules[p].adapter.inputs, rules[p].adapter.outputs)[side]) for p in parts)
    return float(sum(float(layer[leaf].double().square().sum()) for layer, leaves in layers for leaf in leaves) ** 0.5)


def update_norm(rules: Rules, start: Tree, products: frozenset[str], tree: Tree, moved: Movement) -> float:
    """Compute ``‖D‖`` over the whole model.

    If only the core between fixed factors is trained, the update is linear in the leaves, and their distance is used:
    it is a norm of the update, and equal to ``‖D‖`` for orthonormal factors.
    """
    square = 0.0
    for rule in dict.fromkeys(rules.values()):
        parts = [part for part in rules if rules[part] == rule and part in moved.leaves]
        if not rule.adapter.inputs or not products.issuperset(parts):
            square += sum(moved.leaves[part] for part in parts)
            continue
        sent = {part: tree[part] for part in parts}
        for group in group_by_shape(parts, lambda part, sent=sent: [sent[part]]):  # type: ignore[misc]
            for batch in split_group(group, sum(x.numel() for x in sent[group[0]].values())):
                ends = stack_layers([sent[part] for part in batch])
                device = next(iter(ends.values())).device
                starts = {leaf: x.to(device) for leaf, x in stack_layers([start[part] for part in batch]).items()}
                square += float(squared_norm(_update(rule.adapter, starts, ends)).sum())
    return float(square**0.5)


def _update(adapter: Adapter, start: Layer, sent: Layer) -> Factors:
    """``ΔW`` with the sent leaves minus ``ΔW`` at the start."""
    return difference(adapter.term({**start, **sent}, 1.0), adapter.term(start, 1.0))


def gram_matrix(rules: Rules, shared: Tree, uploads: Sequence[Received]) -> Float[Tensor, "K K"]:
    """Compute ``⟨D_k, D_l⟩`` over the whole model, float64 on the CPU; ``shared`` is the tree that was served.

    One part of all uploads is in memory at a time.
    """
    G = torch.zeros(len(uploads), len(uploads), dtype=torch.float64)
    specs = UploadSpecs(rules, shared)
    # A tree that is kept on disk knows its shapes without being read.
    starts = [check_upload(rules, u.turn, getattr(u.tree, "forms", u.tree), specs.of(u.turn)) for u in uploads]
    for part, rule in rules.items():
        layers = [u.tree[part] for u in uploads]
        if not any(layers):
            continue
        pairs = list(zip([s.start[part] for s in starts], layers))
        if all(part in s.products for s in starts):
            G += inner_products([_update(rule.adapter, a, b) for a, b in pairs])
            continue
        part_sum = torch.zeros_like(G)
        for leaf in sorted({leaf for layer in layers for leaf in layer}):  # a leaf that was not sent has not changed
            changes = [(b.get(leaf, a[leaf]).double() - a[leaf].double()).reshape(-1).cpu() for a, b in pairs]
            X = torch.stack(changes)
            part_sum += X @ X.mT
        G += part_sum
    return (G + G.mT) / 2
