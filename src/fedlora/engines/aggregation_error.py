"""Errors of a round's aggregation: of the served weights, of FedIT and of the best approximation of the rank.

They are relative to ``‖W*‖_F``, for the same uploads, and in orthonormal coordinates: two QR factorisations a weight,
and then only small matrices.
"""

from collections.abc import Mapping, Sequence

import torch

from fedlora.adapters import Dense, LoRA
from fedlora.linalg.factors import scale, total
from fedlora.linalg.geometry import joint_cores, mean_cosine, ratio, spread
from fedlora.methods._base import Method, mean
from fedlora.rounds import Received, Rules, Served, group_by_shape, public_leaves, stack_layers, upload_weights
from fedlora.types import Factors, Layer, Tree, Upload

STACK = 128  # uploads of one weight handled in one batch: more would only hold more memory


def aggregation_errors(
    rules: Rules, before: Tree, uploads: Sequence[Received], kept: Mapping[int, Tree], served: Served
) -> dict[str, dict[str, float]]:
    """Return for each part ``served``, ``fedit``, ``best`` (relative errors), ``drift``, ``cosine A``, ``cosine B``,
    and the method's own notes.

    ``before`` is the tree that the cohort was sent. ``kept`` is each client's own tree, which has the rest of its
    trained weight. ``served`` is missing for a personal method, which serves no weight; ``fedit``, ``best`` and the
    cosine similarities are missing for adapters that are not a pair ``B A`` of one rank.
    """
    errors: dict[str, dict[str, float]] = {}
    for rule in dict.fromkeys(rules.values()):
        if isinstance(rule.adapter, Dense):
            continue
        parts = [part for part in rules if rules[part] == rule]
        ends, shapes = dict[str, list[Layer]](), dict[str, list[Layer]]()
        for part in parts:
            private = [public_leaves(kept.get(u.turn.client, {}).get(part, {})) for u in uploads]
            frozen = [rule.adapter.leading(before[part], u.turn.rank) for u in uploads]
            ends[part] = [{**a, **b, **u.tree[part]} for a, b, u in zip(frozen, private, uploads)]
            terms = enumerate(served.base_updates.get(part, ()))
            factors = {f"{i}{side}": x for i, f in terms for side, x in zip("UV", f)}
            shapes[part] = [*ends[part], served.shared[part], factors]
        weights, size = upload_weights(rule, uploads), max(1, STACK // len(uploads))
        for group in group_by_shape(parts, shapes.__getitem__):
            for i in range(0, len(group), size):
                errors |= _measure_group(rule, group[i : i + size], ends, weights, served)
    return {part: {**errors[part], **served.notes.get(part, {})} for part in errors}


def _measure_group(
    rule: Method, group: Sequence[str], ends: Mapping[str, Sequence[Layer]], weights: Sequence[float], served: Served
) -> dict[str, dict[str, float]]:
    clients = _stack_clients([ends[part] for part in group])
    plain = [rule.adapter.delta(client) for client in clients]
    same = all(f.U is plain[0].U for f in plain)  # then the weight goes into V, and the sum stays as narrow as one
    if not same:  # in float64 before anything is scaled: the drift is a small difference of these sums
        plain = [Factors(f.U.double(), f.V.double()) for f in plain]
    deltas = [Factors(f.U, w * f.V) if same else scale(f, w) for f, w in zip(plain, weights)]
    candidates: dict[str, Factors] = {}
    if not rule.personal:
        terms = zip(*(served.base_updates.get(part, ()) for part in group))
        base_updates = [Factors(torch.stack([f.U for f in fs]), torch.stack([f.V for f in fs])) for fs in terms]
        shared = stack_layers([served.shared[part] for part in group])
        candidates["served"] = total([rule.adapter.delta(shared), *base_updates])
    pairs = isinstance(rule.adapter, LoRA) and len({tuple(c["A"].shape) for c in clients}) == 1
    if pairs:
        uploads = [Upload(None, w, {leaf: c[leaf] for leaf in "AB"}) for c, w in zip(clients, weights)]
        candidates["fedit"] = rule.adapter.delta(mean(uploads))
    W, *cores = joint_cores([total(deltas), *candidates.values()])
    norm = torch.linalg.matrix_norm(W)
    figures = {name: ratio(torch.linalg.matrix_norm(core - W), norm) for name, core in zip(candidates, cores)}
    if pairs:
        rank = clients[0]["A"].shape[-2]
        figures["best"] = ratio(torch.linalg.svdvals(W)[..., rank:].square().sum(-1).sqrt(), norm)
    figures["drift"] = ratio(spread(plain, weights, norm), norm)
    if pairs and len(clients) > 1:
        figures |= {f"cosine {leaf}": mean_cosine([client[leaf] for client in clients]) for leaf in "AB"}
    return {part: {name: float(x[i]) for name, x in figures.items()} for i, part in enumerate(group)}


def _stack_clients(ends: Sequence[Sequence[Layer]]) -> list[Layer]:
    """Stack each client's layers of several parts; a leaf that is the same for all clients is stacked once."""
    first = [layers[0] for layers in ends]
    common = {leaf for leaf in first[0] if all(layer[leaf] is layers[0][leaf] for layers in ends for layer in layers)}
    once = stack_layers([{leaf: layer[leaf] for leaf in common} for layer in first]) if common else {}
    others = [[{k: x for k, x in layers[i].items() if k not in common} for layers in ends] for i in range(len(ends[0]))]
    return [{**once, **stack_layers(parts)} for parts in others]
