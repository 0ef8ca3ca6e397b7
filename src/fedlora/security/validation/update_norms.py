"""A client's update: what its upload changes of what it was served, and the inner products of all updates of a round.

``A`` and ``B`` are only defined up to an invertible ``T``: ``(B T, T⁻¹ A)`` is the same weight. So an update is the
change of the product, ``D_k = s B_k A_k − s B A``, and a norm, a distance or an angle between clients is one of these.
They are sums of products, so the ``K × K`` matrix ``⟨D_k, D_l⟩`` comes from Gram matrices of factors, never from
``m × n`` ones. Parts trained in full, and leaves whose other factor stays with its client, count with the change of
their own numbers: what the server makes of these is linear in them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapters import Adapter
from fedlora.rounds import Received, Rules
from fedlora.security.validation.expected import Expectations, checked
from fedlora.types import Factors, Layer, Tree


def change(adapter: Adapter, start: Layer, end: Layer) -> Factors:
    """``D = ΔW(end) − ΔW(start)`` as ``[dU, U_s] [V_e; dV]``: differences of factors, so that nothing cancels.

    Where a side is the very same tensor in both, ``D`` is one product of it and the other side's difference.
    """
    c, U, V = adapter.term(start, 1.0)
    e = adapter.term(end, 1.0)
    if e.U is U:
        return Factors(U, c * (e.V - V))
    if e.V is V:
        return Factors(c * (e.U - U), V)
    return Factors(torch.cat([c * (e.U - U), c * U], dim=-1), torch.cat([e.V, e.V - V], dim=-2))


def gram(rules: Rules, shared: Tree, uploads: Sequence[Received]) -> Float[Tensor, "K K"]:
    """``⟨D_k, D_l⟩`` over the whole model, float64 on the CPU; ``shared`` is what the cohort was served.

    One part of all uploads is in memory at a time.
    """
    G = torch.zeros(len(uploads), len(uploads), dtype=torch.float64)
    wanted = Expectations(rules, shared)
    starts = [checked(rules, u.turn, _forms(u.tree), wanted.of(u.turn)) for u in uploads]
    for part, rule in rules.items():
        layers = [u.tree[part] for u in uploads]
        if not any(layers):
            continue
        begun = [s.start[part] for s in starts]
        if all(part in s.products for s in starts):
            G += _products([change(rule.adapter, a, {**a, **b}) for a, b in zip(begun, layers)])
        else:
            G += _leaves(begun, layers)
    return (G + G.mT) / 2


def _forms(tree: Tree) -> Tree:
    """The tree for its shapes only; one that is kept on disk knows them without being read."""
    forms: Tree | None = getattr(tree, "forms", None)
    return tree if forms is None else forms


def _products(updates: Sequence[Factors]) -> Tensor:
    """``tr(U_kᵀ U_l V_l V_kᵀ)`` for all pairs: from the ``r × r`` Gram matrix of a side that all have in common, where
    there is one (fixed outer factors can be wide), or from one Gram matrix a side over all uploads."""
    first = updates[0]
    if all(f.U is first.U for f in updates):
        return _weighed(first.U, torch.stack([f.V for f in updates]))
    if all(f.V is first.V for f in updates):
        return _weighed(first.V.mT, torch.stack([f.U.mT for f in updates]))
    U = torch.cat([f.U.double() for f in updates], dim=-1)
    V = torch.cat([f.V.double() for f in updates], dim=-2)
    both = ((U.mT @ U) * (V @ V.mT)).cpu()
    owner = torch.repeat_interleave(torch.arange(len(updates)), torch.tensor([f.V.shape[-2] for f in updates]))
    rows = torch.zeros(len(updates), both.shape[-1], dtype=both.dtype).index_add(0, owner, both)
    return torch.zeros(len(updates), len(updates), dtype=both.dtype).index_add(1, owner, rows)


def _weighed(W: Float[Tensor, "m r"], X: Float[Tensor, "K r n"]) -> Float[Tensor, "K K"]:
    """``⟨W X_k, W X_l⟩`` for all pairs."""
    W, X = W.double(), X.double()
    return ((W.mT @ W @ X).flatten(1) @ X.flatten(1).mT).cpu()


def _leaves(starts: Sequence[Layer], layers: Sequence[Layer]) -> Tensor:
    """The same for changes of the leaves themselves; a leaf that a client did not send has not changed."""
    G = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for leaf in sorted({leaf for layer in layers for leaf in layer}):
        moved = [
            (b[leaf].double() - a[leaf].double()).reshape(-1) if leaf in b else torch.zeros(a[leaf].numel()).double()
            for a, b in zip(starts, layers)
        ]
        X = torch.stack([x.cpu() for x in moved])
        G += X @ X.mT
    return G
