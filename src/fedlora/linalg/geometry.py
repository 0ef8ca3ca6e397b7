"""The geometry of updates: norms, inner products, distances, cosines and angles of low-rank products.

A pair ``(U, V)`` is defined only up to ``(U T, T⁻¹ V)``, so an update is measured by its product, never by its
factors alone. The product is not formed: Gram matrices or QR factorisations of the factors have all that is needed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.sums import Term, apply, regroup, stack
from fedlora.types import Factors

EXACT_RANK = 2048  # inner rank up to which distances are exact; beyond it, they are estimated
PROBES = 64  # random directions of an estimate: a norm to a fifth, a ratio of norms to a few percent


def difference(end: Term, start: Term) -> Factors:
    """``end − start`` as ``[dU, U_s] [V_e; dV]``: factors are subtracted, not products, so nothing cancels.

    Both terms have the scale ``start.c``. If they hold the very same ``U`` or ``V``, the difference is one product of
    it and the other side's difference.
    """
    c, U, V = start
    if end.U is U:
        return Factors(U, c * (end.V - V))
    if end.V is V:
        return Factors(c * (end.U - U), V)
    return Factors(torch.cat([c * (end.U - U), c * U], dim=-1), torch.cat([end.V, end.V - V], dim=-2))


def squared_norm(f: Factors) -> Float[Tensor, "*stack"]:
    """``‖U V‖²_F = tr(UᵀU V Vᵀ)`` in float64, from two Gram matrices in the factors' precision."""
    squares: Tensor = ((f.U.mT @ f.U).double() * (f.V @ f.V.mT).double()).sum((-2, -1)).clamp_min(0)
    return squares


def norms(terms: Sequence[Term]) -> Float[Tensor, "K *stack"]:
    """``‖c_k U_k V_k‖_F`` of each term, float64."""
    return torch.stack([squared_norm(Factors(t.U, t.V)) * t.c**2 for t in terms]).sqrt()


def inner_products(updates: Sequence[Factors]) -> Float[Tensor, "K K"]:
    """``⟨D_k, D_l⟩ = tr(U_kᵀ U_l V_l V_kᵀ)`` of all pairs, float64 on the CPU.

    If all updates share one side, its ``r × r`` Gram matrix is used: a fixed outer factor can be wide.
    """
    first = updates[0]
    if all(f.U is first.U for f in updates):
        return _weighted_inner_products(first.U, torch.stack([f.V for f in updates]))
    if all(f.V is first.V for f in updates):
        return _weighted_inner_products(first.V.mT, torch.stack([f.U.mT for f in updates]))
    U = torch.cat([f.U.double() for f in updates], dim=-1)
    V = torch.cat([f.V.double() for f in updates], dim=-2)
    products = ((U.mT @ U) * (V @ V.mT)).cpu()
    owner = torch.repeat_interleave(torch.arange(len(updates)), torch.tensor([f.V.shape[-2] for f in updates]))
    rows = torch.zeros(len(updates), len(owner), dtype=products.dtype).index_add(0, owner, products)
    return torch.zeros(len(updates), len(updates), dtype=products.dtype).index_add(1, owner, rows)


def _weighted_inner_products(W: Float[Tensor, "m r"], X: Float[Tensor, "K r n"]) -> Float[Tensor, "K K"]:
    """``⟨W X_k, W X_l⟩`` of all pairs."""
    W, X = W.double(), X.double()
    return ((W.mT @ W @ X).flatten(1) @ X.flatten(1).mT).cpu()


def squared_distances(G: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """``‖D_k − D_l‖²`` of all pairs, from their inner products ``G``."""
    squares = G.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * G).clamp_min(0)


def distances(terms: Sequence[Term], others: Sequence[Sequence[Term]]) -> tuple[float, list[float]]:
    """``‖W‖_F``, and the distance of each other sum from ``W``, relative to it (0 if ``W`` is zero).

    Exact up to an inner rank of ``EXACT_RANK``, and estimated from random directions beyond it; then no sum is held.
    """
    if len(terms) * terms[0].V.shape[-2] <= EXACT_RANK:
        sums = [stack(t._replace(U=t.U.double(), V=t.V.double()) for t in several) for several in (terms, *others)]
        W, *rest = joint_cores(sums)
    else:
        V = terms[0].V
        probes = torch.randn(V.shape[-1], PROBES, generator=torch.Generator().manual_seed(0)).to(V)
        W, *rest = (apply(regroup(several), probes).double() / PROBES**0.5 for several in (terms, *others))
    norm = torch.linalg.matrix_norm(W)
    return float(norm), [float(ratio(torch.linalg.matrix_norm(X - W), norm)) for X in rest]


def joint_cores(products: Sequence[Factors]) -> list[Float[Tensor, "*stack p q"]]:
    """``C_i`` in ``U_i V_i = Q_u C_i Q_vᵀ``, float64, with orthonormal ``Q_u`` and ``Q_v`` common to all products.

    Norms, distances and singular values of the products are those of the small ``C_i``.
    """
    R_u, R_v = _triangles([f.U for f in products]), _triangles([f.V.mT for f in products])
    return [u @ v.mT for u, v in zip(R_u, R_v)]


def _triangles(sides: Sequence[Tensor]) -> list[Tensor]:
    """Each side in one orthonormal basis of them all; a side that occurs twice is factorised once."""
    unique = {id(side): side.double() for side in sides}
    R = torch.linalg.qr(torch.cat(list(unique.values()), dim=-1), mode="r").R
    triangles = dict(zip(unique, R.split([side.shape[-1] for side in unique.values()], dim=-1)))
    return [triangles[id(side)] for side in sides]


def spread(updates: Sequence[Factors], weights: Sequence[float], norm: Tensor) -> Float[Tensor, "*stack"]:
    """``√(Σ w_k ‖D_k − W‖²)`` with ``W = Σ w_k D_k`` and ``norm = ‖W‖_F``.

    If all updates hold the very same ``U``, it is computed from ``V_k − V̄``, and nothing cancels.
    """
    first = updates[0]
    if all(f.U is first.U for f in updates):
        mean = sum((w * f.V for f, w in zip(updates, weights)), torch.zeros_like(first.V))
        G = first.U.mT @ first.U
        squares = [w * ((G @ (f.V - mean)) * (f.V - mean)).sum((-2, -1)).double() for f, w in zip(updates, weights)]
        return torch.stack(squares).sum(0).clamp_min(0).sqrt()
    whole = torch.zeros_like(norm)
    for f, w in zip(updates, weights):
        whole = whole + w * squared_norm(Factors(f.U.double(), f.V.double()))
    return (whole - norm.square()).clamp_min(0).sqrt()


def ratio(error: Tensor, norm: Tensor) -> Tensor:
    """``error / norm``, and 0 where ``norm`` is 0."""
    return torch.where(norm > 0, error / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))


def mean_cosine(matrices: Sequence[Float[Tensor, "*stack m r"]]) -> Float[Tensor, "*stack"]:
    """Mean cosine over all pairs, float64; the cosine with a zero matrix is 0.

    The squared sum of ``K`` unit vectors is ``K`` plus twice the cosines of all pairs, so one pass is enough.
    """
    total = torch.zeros_like(matrices[0], dtype=torch.float64).flatten(-2)
    lengths = torch.zeros_like(total[..., 0])
    for x in matrices:
        unit = torch.nn.functional.normalize(x.double().flatten(-2), dim=-1)
        total, lengths = total + unit, lengths + unit.square().sum(-1)
    return ((total.square().sum(-1) - lengths) / (len(matrices) * (len(matrices) - 1))).clamp(-1, 1)


def mean_principal_angle(spaces: Float[Tensor, "K m r"]) -> float:
    """Mean principal angle over all pairs of column spaces, in radians."""
    Q = torch.linalg.qr(spaces).Q
    i, j = torch.triu_indices(len(Q), len(Q), 1)
    return float(torch.linalg.svdvals(Q[i].mT @ Q[j]).clamp(0, 1).acos().mean())
