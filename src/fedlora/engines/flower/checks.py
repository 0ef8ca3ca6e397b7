"""What a reply must be before it can touch the aggregate."""

import math
from collections.abc import Mapping

import torch

from fedlora.engines.loop import Federation
from fedlora.method import Method
from fedlora.rounds import public
from fedlora.tasks.task import Scores
from fedlora.types import Layer, Tree


class RefusedError(ValueError):
    """A reply that is left out; the text says why."""


def upload(f: Federation, shared: Tree, sent: Tree) -> Tree:
    """The upload with every part of the model. ``RefusedError``: unknown parts or leaves, wrong shapes, no numbers."""
    strange = sorted(sent.keys() - f.rules.keys())
    if strange:
        raise RefusedError(f"it sent the part {strange[0]!r}, which the model does not have")
    for part, layer in sent.items():
        _layer(part, f.rules[part], public(shared[part]), layer)
    return {part: sent.get(part, {}) for part in f.rules}


def _layer(part: str, rule: Method, shared: Layer, sent: Layer) -> None:
    for leaf, x in sent.items():
        if leaf not in rule.adapter.trainable or leaf not in shared:
            raise RefusedError(f"it sent the leaf {leaf!r} of {part!r}, which no client trains")
        found, needed = tuple(x.shape), tuple(shared[leaf].shape)
        smaller = len(found) == len(needed) and all(0 < a <= b for a, b in zip(found, needed))
        if found != needed and not (rule.any_rank and smaller):
            raise RefusedError(f"it sent {leaf!r} of {part!r} with shape {found}, not {needed}")
        if not x.is_floating_point() or not bool(torch.isfinite(x).all()):
            raise RefusedError(f"it sent {leaf!r} of {part!r} with values that are no finite numbers")


def same_leaves(trees: Mapping[int, Tree], f: Federation) -> dict[int, str]:
    """Clients whose upload lacks what the others sent, where a method averages what all of them train."""
    parts = [part for part, rule in f.rules.items() if not rule.any_rank]
    if len(trees) < 2 or not parts:
        return {}
    forms = {client: tuple(frozenset(tree[part]) for part in parts) for client, tree in trees.items()}
    kinds = list(forms.values())
    usual = max(kinds, key=kinds.count)
    return {
        client: "it did not send the leaves that the others sent" for client, form in forms.items() if form != usual
    }


def figures(metrics: Mapping[str, object], number: int) -> tuple[int, float]:
    """Rows and loss of a turn. ``RefusedError`` where they are of another round, or no numbers."""
    if metrics.get("round") != number:
        raise RefusedError(f"it answered for round {metrics.get('round')!r}, not {number}")
    rows, loss = metrics.get("examples"), metrics.get("loss")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise RefusedError(f"it claims {rows!r} training rows")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise RefusedError(f"its loss is {loss!r}")
    return rows, loss


def scores(metrics: Mapping[str, object], number: int) -> Scores:
    """A client's sums and counts. ``RefusedError`` where they are of another round, or no numbers."""
    if metrics.get("round") != number:
        raise RefusedError(f"it answered for round {metrics.get('round')!r}, not {number}")
    names = [key.removesuffix(".sum") for key in metrics if key.endswith(".sum")]
    found = {name: (metrics[f"{name}.sum"], metrics.get(f"{name}.count")) for name in names}
    for name, (total, count) in found.items():
        sound = isinstance(total, int | float) and math.isfinite(total) and isinstance(count, int) and count > 0
        if not sound:
            raise RefusedError(f"its score {name!r} is {total!r} over {count!r} rows")
    if "accuracy" not in found:
        raise RefusedError(f"its scores are {', '.join(found) or 'none'}, without accuracy")
    return Scores(found)
