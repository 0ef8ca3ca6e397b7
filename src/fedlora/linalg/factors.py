"""Algebra of one low-rank product ``U V``: sum, scale, rank reduction, truncated SVD, nearest rotations.

All functions are pure and take leading dimensions (``*stack``), so weights of one shape are handled in one call. None
forms an ``m × n`` matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.types import Factors


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """``torch.einsum`` that contracts from left to right.

    With opt_einsum installed (a dependency of Opacus), PyTorch reorders three operands, which changes the last bits.
    The bits must not depend on the packages that a machine has.
    """
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(equation, *operands)


def total(parts: Sequence[Factors]) -> Factors:
    """The sum of products as one product of stacks: ``Σ U_k V_k = [U_1 … U_K] [V_1; …; V_K]``.

    Parts that hold the very same ``V`` (or ``U``) are added up, so the inner rank stays small if all clients share one
    side (FFA-LoRA's ``A``, both outer factors of Ravan).
    """
    parts = _merge(parts, side=1)
    parts = _merge(parts, side=0)
    return Factors(torch.cat([p.U for p in parts], dim=-1), torch.cat([p.V for p in parts], dim=-2))


def _merge(parts: Sequence[Factors], side: int) -> list[Factors]:
    """Add up the parts that hold the very same tensor as factor number ``side``."""
    groups: dict[int, list[Factors]] = {}
    for part in parts:
        groups.setdefault(id(part[side]), []).append(part)
    return [group[0] if len(group) == 1 else _add(group, side) for group in groups.values()]


def _add(group: Sequence[Factors], side: int) -> Factors:
    other = torch.stack([part[1 - side] for part in group]).sum(0)
    return Factors(group[0].U, other) if side == 0 else Factors(other, group[0].V)


def scale(f: Factors, c: float) -> Factors:
    """``c U V``. The scale goes into ``U``, since ``V`` is shared with other parts more often."""
    return Factors(c * f.U, f.V)


def compact(f: Factors) -> Factors:
    """Reduce the inner rank to at most ``min(m, n)`` without changing the product."""
    m, n = f.U.shape[-2], f.V.shape[-1]
    if f.V.shape[-2] <= min(m, n):
        return f
    if m <= n:
        Q, R = torch.linalg.qr(f.U)
        return Factors(Q, R @ f.V)
    Q, R = torch.linalg.qr(f.V.mT)
    return Factors(f.U @ R.mT, Q.mT)


class Core(NamedTuple):
    """A product in orthonormal coordinates, ``U V = Qu C Qvᵀ``; its norm and singular values are those of ``C``."""

    Qu: Float[Tensor, "*stack m p"]
    C: Float[Tensor, "*stack p q"]
    Qv: Float[Tensor, "*stack n q"]


def core(f: Factors) -> Core:
    """Compute the core by two thin QR factorisations: ``O((m + n) r²)`` instead of ``O(m n r)``."""
    Qu, Ru = torch.linalg.qr(f.U)
    Qv, Rv = torch.linalg.qr(f.V.mT)
    return Core(Qu, Ru @ Rv.mT, Qv)


def truncate(f: Factors, rank: int) -> Factors:
    """The best rank-``rank`` approximation (Eckart and Young 1936), with ``√S`` on both sides."""
    Qu, C, Qv = core(f)
    P, S, Qt = torch.linalg.svd(C, full_matrices=False)
    root = S[..., :rank].sqrt()
    return Factors((Qu @ P[..., :, :rank]) * root[..., None, :], (root[..., :, None] * Qt[..., :rank, :]) @ Qv.mT)


def procrustes(M: Float[Tensor, "*stack r r"]) -> tuple[Float[Tensor, "*stack r r"], Float[Tensor, "*stack r"]]:
    """The rotation ``R`` (determinant 1) that maximises ``tr(Rᵀ M)`` (Kabsch 1976), and ``M``'s singular values."""
    P, S, Qt = torch.linalg.svd(M)
    sign = torch.linalg.det(P @ Qt).sign()
    last = torch.ones(M.shape[:-1], dtype=M.dtype, device=M.device)
    flip = torch.cat([last[..., :-1], sign[..., None]], dim=-1)
    return (P * flip[..., None, :]) @ Qt, S


def polar(M: Float[Tensor, "*stack r r"]) -> tuple[Float[Tensor, "*stack r r"], Float[Tensor, "*stack r"]]:
    """The orthogonal matrix nearest to ``M``, and ``M``'s singular values."""
    P, S, Qt = torch.linalg.svd(M)
    return P @ Qt, S
