"""Aggregate the uploads of one run with several methods, to compare their aggregation errors on equal factors.

The run itself is not changed.
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
    """Return ``methods``, each label's ``error`` and ``gauge``, and the ``tail`` and ``angles`` of the uploads.

    ``error`` is ``‖served − W*‖ / ‖W*‖`` over all weights, ``gauge`` the relative distance of the served factors from
    FedIT's means (for equal ranks), ``tail`` the share of ``‖W*‖²`` beyond the adapter's rank, and ``angles`` the mean
    principal angle between two clients' row spaces of ``A`` and column spaces of ``B``, in degrees. Raises
    ``ValueError`` if an upload lacks a factor.
    """
    parts = [part for part, rule in rules.items() if isinstance(rule.adapter, LoRA)]
    if not parts or any(not set(u.tree[part]) >= FACTORS for u in uploads for part in parts):
        raise ValueError(
            "the oracle needs uploads of both A and B, and this run's method sends something else; set method.name to "
            "fedit."
        )
    ends = {part: [u.tree[part] for u in uploads] for part in parts}
    weights = upload_weights(rules[parts[0]], uploads)
    equal = len({layer["A"].shape[-2] for layers in ends.values() for layer in layers}) == 1
    results = {}
    for label, method in methods.items():
        if equal or method.any_rank:  # with the run's weights, so that all methods approximate one mean
            method = replace(method, weighting=rules[parts[0]].weighting)
            results[label] = _aggregate(method, parts, before, uploads, ends, weights, equal)
    cut = whole = 0.0
    for part in parts:
        terms = (rules[part].adapter.term(x, w) for x, w in zip(ends[part], weights))
        (core,) = joint_cores([stack(t._replace(U=t.U.double(), V=t.V.double()) for t in terms)])
        squares = torch.linalg.svdvals(core).square()
        cut += float(squares[rules[parts[0]].adapter.budget :].sum())
        whole += float(squares.sum())
    angles = {leaf: _angle(ends, leaf) for leaf in "AB"} if equal and len(uploads) > 1 else {}
    return {"methods": results, "tail": cut / whole if whole else 0.0, "angles": angles}


def _aggregate(method: Method, parts, before: Tree, uploads, ends, weights, equal: bool) -> dict[str, float]:
    rules = dict.fromkeys(parts, method)
    sent = [
        u._replace(tree={p: method.send(Work(before[p], u.tree[p], FACTORS), u.turn) for p in parts}) for u in uploads
    ]
    # A zero update of the right shape: combining may use only the shape of the leaves before.
    start = {p: {"A": before[p]["A"], "B": torch.zeros_like(before[p]["B"])} for p in parts}
    served = server_turn(rules, start, sent)
    lost = whole = gauge = 0.0
    for p in parts:
        exact = [method.adapter.term(x, w) for x, w in zip(ends[p], weights)]
        layer = served.shared[p]
        base_updates = [Term(1.0, *f) for f in served.base_updates.get(p, ())]
        norm, (error,) = distances(exact, [[method.adapter.term(layer, 1.0), *base_updates]])
        lost, whole = lost + (error * norm) ** 2, whole + norm**2
        gauge += _gauge(layer, ends[p], weights) / len(parts) if equal else 0.0
    return {"error": (lost / whole) ** 0.5 if whole else 0.0, **({"gauge": gauge} if equal else {})}


def _gauge(layer: Layer, ends: Sequence[Layer], weights: Sequence[float]) -> float:
    squares = 0.0
    for leaf in "AB":
        mean = sum((w * x[leaf] for w, x in zip(weights, ends)), torch.zeros_like(ends[0][leaf]))
        squares += float((layer[leaf] - mean).square().sum() / mean.square().sum().clamp_min(1e-30))
    return float(squares / 2) ** 0.5


def _angle(ends: Mapping[str, Sequence[Layer]], leaf: str) -> float:
    """Return the mean principal angle over all pairs of clients and all weights, in degrees."""
    angles = []
    for layers in ends.values():
        tall = torch.stack([x[leaf].double() if leaf == "B" else x[leaf].double().mT for x in layers])
        angles.append(mean_principal_angle(tall))
    return float(torch.rad2deg(torch.tensor(sum(angles) / len(angles))))
