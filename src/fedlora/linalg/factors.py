"""Low-rank algebra. Everything here is pure, and exact unless its name says otherwise.

All functions take leading dimensions (``*stack``), so weights of one shape are handled in one call,
and none forms an ``m × n`` matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.types import Factors


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """``torch.einsum`` from left to right.

    Where opt_einsum is installed (Opacus brings it), torch takes three operands in an order of its choice, which has
    other last bits: parties would differ by what else is on their machines.
    """
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(equation, *operands)


def total(parts: Sequence[Factors]) -> Factors:
    """The sum of products is the product of stacks: ``Σ U_k V_k = [U_1 … U_K] [V_1; …; V_K]``.

    Parts that hold the very same ``V`` (or ``U``) are added instead, which keeps the inner rank small when one
    side is common to all clients (FFA-LoRA's ``A``, both outer factors of Ravan).
    """
    parts = _added(parts, side=1)
    parts = _added(parts, side=0)
    return Factors(torch.cat([p.U for p in parts], dim=-1), torch.cat([p.V for p in parts], dim=-2))


def _added(parts: Sequence[Factors], side: int) -> list[Factors]:
    """Adds up the parts whose factor number ``side`` is one and the same tensor."""
    same: dict[int, list[Factors]] = {}
    for part in parts:
        same.setdefault(id(part[side]), []).append(part)
    return [group[0] if len(group) == 1 else _sum(group, side) for group in same.values()]


def _sum(group: Sequence[Factors], side: int) -> Factors:
    other = torch.stack([part[1 - side] for part in group]).sum(0)
    return Factors(group[0].U, other) if side == 0 else Factors(other, group[0].V)


def scaled(f: Factors, c: float) -> Factors:
    """``c ΔW``. The scale goes into the side that is not shared with other parts most often: ``U``."""
    return Factors(c * f.U, f.V)


def compacted(f: Factors) -> Factors:
    """The same product at rank ``min(m, n)`` at most: beyond it, factors would be larger than they need to be."""
    m, n = f.U.shape[-2], f.V.shape[-1]
    if f.V.shape[-2] <= min(m, n):
        return f
    if m <= n:
        Q, R = torch.linalg.qr(f.U)
        return Factors(Q, R @ f.V)
    Q, R = torch.linalg.qr(f.V.mT)
    return Factors(f.U @ R.mT, Q.mT)


class Core(NamedTuple):
    """A product in orthonormal coordinates: ``U V = Qu C Qvᵀ``, so norms and singular values are those of ``C``."""

    Qu: Float[Tensor, "*stack m p"]
    C: Float[Tensor, "*stack p q"]
    Qv: Float[Tensor, "*stack n q"]


def core(f: Factors) -> Core:
    """Two thin QR factorisations: ``O((m + n) r²)`` instead of ``O(m n r)``."""
    Qu, Ru = torch.linalg.qr(f.U)
    Qv, Rv = torch.linalg.qr(f.V.mT)
    return Core(Qu, Ru @ Rv.mT, Qv)


def truncated(f: Factors, rank: int) -> Factors:
    """The best rank-``rank`` approximation (Eckart and Young 1936), with ``√S`` on both sides."""
    Qu, C, Qv = core(f)
    P, S, Qt = torch.linalg.svd(C, full_matrices=False)
    root = S[..., :rank].sqrt()
    return Factors((Qu @ P[..., :, :rank]) * root[..., None, :], (root[..., :, None] * Qt[..., :rank, :]) @ Qv.mT)


def norm(f: Factors) -> Float[Tensor, "*stack"]:
    """``‖U V‖_F`` from the core: a difference of Gram traces would cancel."""
    found: Tensor = torch.linalg.matrix_norm(core(f).C)
    return found


def procrustes(M: Float[Tensor, "*stack r r"]) -> tuple[Float[Tensor, "*stack r r"], Float[Tensor, "*stack r"]]:
    """The rotation ``R`` (determinant one) maximising ``tr(Rᵀ M)`` (Kabsch 1976), and ``M``'s spectrum."""
    P, S, Qt = torch.linalg.svd(M)
    sign = torch.linalg.det(P @ Qt).sign()
    last = torch.ones(M.shape[:-1], dtype=M.dtype, device=M.device)
    flip = torch.cat([last[..., :-1], sign[..., None]], dim=-1)
    return (P * flip[..., None, :]) @ Qt, S


def polar(M: Float[Tensor, "*stack r r"]) -> tuple[Float[Tensor, "*stack r r"], Float[Tensor, "*stack r"]]:
    """The orthogonal matrix nearest to ``M``; and ``M``'s spectrum."""
    P, S, Qt = torch.linalg.svd(M)
    return P @ Qt, S
