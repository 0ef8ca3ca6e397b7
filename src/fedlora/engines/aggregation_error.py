"""How far what was served lies from the exact mean, and what FedIT and the best rank would have done.

All of it on the same uploads, relative to ``‖W*‖_F``, and in orthonormal coordinates: two QR factorisations a weight
and then only small matrices.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
    """Part -> ``served``, ``fedit``, ``best`` (relative errors), ``drift``, ``cosine A``, ``cosine B``, and the
    method's own notes.

    ``before`` is what the cohort was sent and ``kept`` what each client kept of the round: with its upload, that is
    its trained weight. ``served`` is missing for a personal method, which serves no weight of its own; ``fedit``,
    ``best`` and the cosine similarity of factors for adapters that are not a pair ``B A`` of one rank.
    """
    found: dict[str, dict[str, float]] = {}
    for rule in dict.fromkeys(rules.values()):
        if isinstance(rule.adapter, Dense):
            continue
        parts = [part for part in rules if rules[part] == rule]
        ends = {
            part: [_end(rule, before[part], kept.get(u.turn.client, {}).get(part, {}), u, part) for u in uploads]
            for part in parts
        }
        after = {part: served.shared[part] for part in parts}
        weights = upload_weights(rule, uploads)
        forms = {part: [*ends[part], after[part], _base_update_shapes(served, part)] for part in parts}
        most = max(1, STACK // len(uploads))
        for group in (
            g[i : i + most] for g in group_by_shape(parts, forms.__getitem__) for i in range(0, len(g), most)
        ):
            found |= _group(rule, group, ends, weights, after, served)
    return {part: {**found[part], **served.notes.get(part, {})} for part in found}


def _end(rule: Method, before: Layer, kept: Layer, upload: Received, part: str) -> Layer:
    """A client's trained leaves, and the frozen ones at its own budget."""
    return {**rule.adapter.leading(before, upload.turn.rank), **public_leaves(kept), **upload.tree[part]}


def _base_update_shapes(served: Served, part: str) -> Layer:
    return {f"{i}{side}": x for i, f in enumerate(served.base_updates.get(part, ())) for side, x in zip("UV", f)}


def _group(rule, group, ends, weights, after, served) -> dict[str, dict[str, float]]:
    """Parts of one shape, measured in one batch."""
    clients = _clients([ends[part] for part in group])
    plain = [rule.adapter.delta(client) for client in clients]
    same = all(f.U is plain[0].U for f in plain)  # then the weight goes into V, and the sum stays as narrow as one
    if not same:  # in float64 before anything is scaled: the drift is a small difference of these sums
        plain = [Factors(f.U.double(), f.V.double()) for f in plain]
    deltas = [Factors(f.U, w * f.V) if same else scale(f, w) for f, w in zip(plain, weights)]
    candidates: dict[str, Factors] = {}
    if not rule.personal:
        base_updates = [
            _batch([served.base_updates[p][i] for p in group])
            for i in range(len(served.base_updates.get(group[0], ())))
        ]
        candidates["served"] = total([rule.adapter.delta(stack_layers([after[part] for part in group])), *base_updates])
    pairs = isinstance(rule.adapter, LoRA) and len({tuple(c["A"].shape) for c in clients}) == 1
    if pairs:
        uploads = [Upload(None, w, {leaf: c[leaf] for leaf in "AB"}) for c, w in zip(clients, weights)]
        candidates["fedit"] = rule.adapter.delta(mean(uploads))
    figures = _figures(total(deltas), candidates, clients[0]["A"].shape[-2] if pairs else None)
    norm = figures.pop("norm")
    figures["drift"] = ratio(spread(plain, weights, norm), norm)
    if pairs and len(clients) > 1:
        figures |= {f"cosine {leaf}": mean_cosine([client[leaf] for client in clients]) for leaf in "AB"}
    return {part: {name: float(x[i]) for name, x in figures.items()} for i, part in enumerate(group)}


def _clients(ends: Sequence[Sequence[Layer]]) -> list[Layer]:
    """Each client's layers of several parts, stacked; a leaf that all clients hold in common is one tensor for all."""
    first = [layers[0] for layers in ends]
    common = {leaf for leaf in first[0] if all(layer[leaf] is layers[0][leaf] for layers in ends for layer in layers)}
    once = stack_layers([{leaf: layer[leaf] for leaf in common} for layer in first]) if common else {}
    own = [[{k: x for k, x in layers[i].items() if k not in common} for layers in ends] for i in range(len(ends[0]))]
    return [{**once, **stack_layers(parts)} for parts in own]


def _figures(exact: Factors, candidates: Mapping[str, Factors], rank: int | None) -> dict[str, Tensor]:
    """Norm of the exact mean, each candidate's relative error, and the best possible at this rank."""
    W, *cores = joint_cores([exact, *candidates.values()])
    norm = torch.linalg.matrix_norm(W)
    found = {"norm": norm}
    for name, core in zip(candidates, cores):
        found[name] = ratio(torch.linalg.matrix_norm(core - W), norm)
    if rank is not None:
        found["best"] = ratio(torch.linalg.svdvals(W)[..., rank:].square().sum(-1).sqrt(), norm)
    return found


def _batch(factors: Sequence[Factors]) -> Factors:
    return Factors(torch.stack([f.U for f in factors]), torch.stack([f.V for f in factors]))
