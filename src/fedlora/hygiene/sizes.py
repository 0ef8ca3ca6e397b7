"""How large an upload's change is, and how far its factors have moved: one pass over it, from small Gram matrices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.forms import LARGEST, Checked, finite
from fedlora.method import Method
from fedlora.rounds import Rules, alike, batches, stacked
from fedlora.types import Layer
from fedlora.updates import change


class Sizes(NamedTuple):
    """Squares of norms, part by part. ``sides`` has only parts of two factors that both came."""

    updates: dict[str, float]  # of the change of the weight, or of the leaves where there is no product to see
    sides: dict[str, tuple[float, float]]  # of the change of the input and of the output factors
    served: dict[str, tuple[float, float]]  # of these factors as they were served


def sizes(rules: Rules, found: Checked) -> Sizes:
    """An upload's sizes. ``RefusedError`` where a number in it is not finite or beyond all bounds."""
    whole = Sizes({}, {}, {})
    for rule in dict.fromkeys(rules.values()):
        parts = [part for part in rules if rules[part] == rule and found.tree[part]]
        for group in alike(parts, lambda part: [found.tree[part]]):
            for some in batches(group, sum(x.numel() for x in found.tree[group[0]].values())):
                _some(rule, some, found, whole)
    return whole


def _some(rule: Method, parts: Sequence[str], found: Checked, whole: Sizes) -> None:
    """Parts of one shape, in one batch."""
    start = stacked([found.start[part] for part in parts])
    sent = stacked([found.tree[part] for part in parts])
    start = {leaf: x.to(next(iter(sent.values())).device) for leaf, x in start.items()}
    moved = {leaf: _squares(x - start[leaf]) for leaf, x in sent.items()}
    inputs, outputs = (sorted(side & sent.keys()) for side in (rule.adapter.inputs, rule.adapter.outputs))
    # Where nothing but the inside of fixed factors is trained, the update is linear in the leaves: their norm is one
    # of it, and the same where the fixed factors are orthonormal.
    product = bool(rule.adapter.inputs) and parts[0] in found.products
    update = _norms(rule, start, {**start, **sent}) if product else sum(moved.values())
    rows = [update, *([_sum(moved, inputs), _sum(moved, outputs)] if inputs and outputs else [])]
    table = torch.stack([torch.as_tensor(row).double().cpu() for row in rows]).mT.tolist()
    largest = float(torch.stack([*moved.values()]).max())
    if not largest <= (LARGEST / 2) ** 2:  # not a number, or some that are too large
        for part in parts:
            finite(part, found.tree[part])
    whole.updates.update({part: row[0] for part, row in zip(parts, table)})
    if inputs and outputs:
        whole.sides.update({part: (row[1], row[2]) for part, row in zip(parts, table)})
        before = [_sum({leaf: _squares(start[leaf]) for leaf in side}, side) for side in (inputs, outputs)]
        both = torch.stack(before).double().mT.tolist()
        whole.served.update({part: (row[0], row[1]) for part, row in zip(parts, both)})


def _squares(x: Tensor) -> Tensor:
    """The square of each part's norm, summed in float32: a tenth of a percent is more than is needed."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).square()


def _sum(squares: dict[str, Tensor], leaves: Sequence[str]) -> Tensor:
    return torch.stack([squares[leaf] for leaf in leaves]).sum(0)


def _norms(rule: Method, start: Layer, end: Layer) -> Tensor:
    U, V = change(rule.adapter, start, end)
    return ((U.mT @ U) * (V @ V.mT)).sum((-2, -1)).clamp_min(0)
