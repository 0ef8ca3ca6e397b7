"""Frames of a product: of all factors with ``B A = W``, those near given ones.

Averaging, Adam's moments and the next round's training all depend on the factors, not only on their product. A
balanced SVD turns and rescales them at every round; these keep the product and stay near where training was.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedlora.linalg import polar
from fedlora.products import SVD, Term, applied, applied_back, held

CUT, CUT_SINGLE = 1e-12, 1e-6  # relative: below it a direction of a normal matrix is rounding error
ILL = 1e-3  # an anchor that shrinks some direction below this share of its largest would blow B up

Pair = tuple[Float[Tensor, "*stack r n"], Float[Tensor, "*stack m r"]]


def rotated(A: Tensor, B: Tensor, near_A: Tensor, near_B: Tensor) -> Pair:
    """``T A`` and ``B Tᵀ`` with the orthogonal ``T`` that brings both nearest: ``T = polar(A_near Aᵀ + B_nearᵀ B)``."""
    T = polar(near_A.double() @ A.double().mT + near_B.double().mT @ B.double())[0].to(A.dtype)
    return T @ A, B @ T.mT


def anchored(found: SVD, near_A: Tensor, near_B: Tensor) -> Pair:
    """``A'`` is ``near_A`` projected on the row space of ``W``; ``B' = W A'⁺``.

    Where ``W`` has fewer directions than rows, the row space is filled up with ``near_A``'s own, so that no row of
    ``A'`` dies. Where the projection is nearly singular, the balanced factors are turned (``rotated``) instead.
    """
    rank, (P, S, Q) = near_A.shape[-2], found
    if rank > min(P.shape[-2], Q.shape[-2]):  # A' cannot have so many independent rows
        return rotated(*balanced(found, rank), near_A, near_B)
    rounding = torch.finfo(S.dtype).eps * max(P.shape[-2], Q.shape[-2])
    live = (S / S[..., :1].clamp_min(1e-30)) > rounding
    full = S.shape[-1] == rank and bool(live.all())
    E = Q.double() if full else _filled(Q * live[..., None, :], live, near_A, rank)  # n r, orthonormal
    G = near_A.double() @ E  # A' = G Eᵀ
    core = torch.diag_embed(S.double()) if full else ((S * live).double()[..., :, None] * Q.double().mT) @ E
    s = torch.linalg.svdvals(G)
    sound = (s[..., -1] > ILL * s[..., 0])[..., None, None]
    inverse = torch.linalg.inv(torch.where(sound, G, torch.eye(rank, dtype=G.dtype, device=G.device)))
    E = E.to(P.dtype)  # the long products need no more than the factors have; the small ones decide
    A, B = G.to(P.dtype) @ E.mT, P @ (core @ inverse).to(P.dtype)  # W = P core Eᵀ
    if bool(sound.all()):
        return A, B
    turned_A, turned_B = rotated(*balanced(found, rank), near_A, near_B)
    return torch.where(sound, A, turned_A), torch.where(sound, B, turned_B)


def balanced(found: SVD, rank: int) -> Pair:
    """``√S`` on both sides, with zeros where ``W`` has fewer than ``rank`` directions."""
    U, V = found.factors()
    more = rank - V.shape[-2]
    return functional.pad(V, (0, 0, 0, more)), functional.pad(U, (0, more))


def _filled(Q: Tensor, live: Tensor, near_A: Tensor, rank: int) -> Tensor:
    """``rank`` orthonormal columns: ``Q``'s live ones, then the directions of ``near_A`` that they leave out."""
    rest = near_A.double() - (near_A.double() @ Q.double()) @ Q.double().mT
    more = torch.linalg.svd(rest, full_matrices=False).Vh.mT  # n r
    order = torch.arange(rank, device=Q.device)
    count = live.sum(-1, keepdim=True)
    first = functional.pad(Q.double(), (0, rank - Q.shape[-1]))
    second = more.gather(-1, (order - count).clamp(0)[..., None, :].expand(*more.shape[:-1], rank))
    joined = torch.where((order < count)[..., None, :], first, second)
    basis: Tensor = torch.linalg.qr(joined).Q
    return basis


def swept(terms: Sequence[Term], A: Tensor, B: Tensor, sweeps: int) -> Pair:
    """Alternating least squares for ``min ‖W − B A‖_F``, starting from ``A`` and ``B``.

    Each half-sweep is two passes and an ``r × r`` solve, and none can raise the error. Where a normal matrix is
    singular, the factor stays as it is there.
    """
    wide = held(terms)
    for _ in range(sweeps):
        B = B + _solved(applied(wide, A.mT), B, A @ A.mT)
        A = A + _solved(applied_back(wide, B), A.mT, B.mT @ B).mT
    return A, B


def _solved(image: Tensor, now: Tensor, G: Tensor) -> Tensor:
    """``(image − now G) G⁺``: what the least-squares factor differs by."""
    inverse = torch.linalg.pinv(G.double(), rtol=CUT if G.dtype == torch.float64 else CUT_SINGLE, hermitian=True)
    found: Tensor = (image - now @ G) @ inverse.to(now.dtype)
    return found
