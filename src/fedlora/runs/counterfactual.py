"""One run's uploads under every method: what each would have served of the same factors, round by round.

It parts two questions that papers answer together: how large is a method's aggregation error, and does it cost
accuracy? Nothing here touches the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedlora.adapters import LoRA
from fedlora.linalg.geometry import distances, joint_cores, mean_principal_angle
from fedlora.linalg.sums import Term, stack
from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, server_turn, upload_weights
from fedlora.types import Layer, Tree, Work

FACTORS = frozenset("AB")


def compare_uploads(
    rules: Rules, before: Tree, uploads: Sequence[Received], methods: Mapping[str, Method]
) -> dict[str, Any]:
    """``methods``: label -> relative ``error`` and ``gauge``; and of the uploads themselves ``tail`` and ``angles``.

    ``error`` is ``‖served − W*‖ / ‖W*‖`` over all weights; ``gauge`` how far the served factors lie from FedIT's means,
    relative to them (where all ranks are equal); ``tail`` the share of ``‖W*‖²`` beyond the adapter's rank; ``angles``
    the mean principal angle between two clients' row spaces of ``A`` and column spaces of ``B``, in degrees.
    ``ValueError`` where an upload lacks a factor.
    """
    parts = [part for part, rule in rules.items() if isinstance(rule.adapter, LoRA)]
    odd = next((u for u in uploads for part in parts if not set(u.tree[part]) >= FACTORS), None)
    if not parts or odd is not None:
        raise ValueError(
            "the oracle needs uploads of both A and B, and this run's method sends something else; set method.name to "
            "fedit."
        )
    ends = {part: [u.tree[part] for u in uploads] for part in parts}
    weights = upload_weights(rules[parts[0]], uploads)
    equal = len({layer["A"].shape[-2] for layers in ends.values() for layer in layers}) == 1
    found: dict[str, Any] = {"methods": {}}
    for label, method in methods.items():
        if equal or method.any_rank:  # with the run's own weights: what is compared is one mean
            method = replace(method, weighting=rules[parts[0]].weighting)
            found["methods"][label] = _served(method, parts, before, uploads, ends, weights)
    exact = {p: [rules[p].adapter.term(x, w) for x, w in zip(ends[p], weights)] for p in parts}
    rank = rules[parts[0]].adapter.budget
    found["tail"] = _tail(exact, rank)
    found["angles"] = {leaf: _angle(ends, leaf) for leaf in "AB"} if equal and len(uploads) > 1 else {}
    return found


def _served(method: Method, parts, before: Tree, uploads, ends, weights) -> dict[str, float]:
    rules = dict.fromkeys(parts, method)
    sent = [
        u._replace(tree={p: method.send(Work(before[p], u.tree[p], FACTORS), u.turn) for p in parts}) for u in uploads
    ]
    # A zero update of the right shape: of what was shared before, combining may use nothing but the size.
    start = {p: {"A": before[p]["A"], "B": torch.zeros_like(before[p]["B"])} for p in parts}
    served = server_turn(rules, start, sent)
    lost = whole = moved = 0.0
    equal = len({layer["A"].shape[-2] for layers in ends.values() for layer in layers}) == 1
    for p in parts:
        exact = [method.adapter.term(x, w) for x, w in zip(ends[p], weights)]
        layer = served.shared[p]
        base_updates = [Term(1.0, *f) for f in served.base_updates.get(p, ())]
        norm, (error,) = distances(exact, [[method.adapter.term(layer, 1.0), *base_updates]])
        lost, whole = lost + (error * norm) ** 2, whole + norm**2
        moved += _moved(layer, ends[p], weights) / len(parts) if equal else 0.0
    return {"error": (lost / whole) ** 0.5 if whole else 0.0, **({"gauge": moved} if equal else {})}


def _moved(layer: Layer, ends: Sequence[Layer], weights: Sequence[float]) -> float:
    squares = 0.0
    for leaf in "AB":
        mean = sum((w * x[leaf] for w, x in zip(weights, ends)), torch.zeros_like(ends[0][leaf]))
        squares += float((layer[leaf] - mean).square().sum() / mean.square().sum().clamp_min(1e-30))
    return float(squares / 2) ** 0.5


def _tail(exact: Mapping[str, Sequence[Term]], rank: int) -> float:
    cut = whole = 0.0
    for terms in exact.values():
        (core,) = joint_cores([stack(t._replace(U=t.U.double(), V=t.V.double()) for t in terms)])
        squares = torch.linalg.svdvals(core).square()
        cut, whole = cut + float(squares[rank:].sum()), whole + float(squares.sum())
    return cut / whole if whole else 0.0


def _angle(ends: Mapping[str, Sequence[Layer]], leaf: str) -> float:
    """Mean principal angle over all pairs of clients and all weights, in degrees."""
    found = []
    for layers in ends.values():
        tall = torch.stack([x[leaf].double() if leaf == "B" else x[leaf].double().mT for x in layers])
        found.append(mean_principal_angle(tall))
    return float(torch.rad2deg(torch.tensor(sum(found) / len(found))))
