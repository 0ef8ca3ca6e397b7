"""Choice of the factors of a known product: of all pairs with ``B A = W``, balanced ones or those near given ones.

Averaging, Adam's moments and the next round's training depend on the factors, not only on their product. The balanced
factors of an SVD are rotated and rescaled at each round. The other choices stay near the factors that were trained.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedlora.linalg.factors import polar
from fedlora.linalg.sums import SVD, Term, apply, apply_transpose, regroup

CUT, CUT_SINGLE = 1e-12, 1e-6  # relative: below it a direction of a normal matrix is rounding error
ILL = 1e-3  # a start that shrinks a direction below this share of its largest would make B too large
CANCELLED = 0.1  # if ``‖A_near‖ ‖B_near‖`` is below this share of ``‖A‖ ‖B‖``, there is nothing to stay near
STEPS, SETTLED = 12, 1e-3  # Gauss-Newton steps at most, and the relative gain that ends them

Pair = tuple[Float[Tensor, "*stack r n"], Float[Tensor, "*stack m r"]]


def rotate(A: Tensor, B: Tensor, near_A: Tensor, near_B: Tensor) -> Pair:
    """``T A`` and ``B Tᵀ`` nearest to the given factors: the orthogonal ``T = polar(A_near Aᵀ + B_nearᵀ B)``."""
    T = polar(near_A.double() @ A.double().mT + near_B.double().mT @ B.double())[0].to(A.dtype)
    return T @ A, B @ T.mT


def anchor(svd: SVD, near_A: Tensor, near_B: Tensor) -> Pair:
    """``T A`` and ``B T⁻¹`` nearest to the given factors for an invertible ``T``, each relative to its own size.

    Minimises ``f(T) = ‖T A − A_near‖² / ‖A_near‖² + ‖B T⁻¹ − B_near‖² / ‖B_near‖²`` by Gauss-Newton steps that never
    raise it, from the best of three starts: the rotation, and the least squares of either side. If ``W`` has a smaller
    rank than ``A`` has rows, directions of ``A_near`` fill them up, so no row of ``A`` becomes zero. If ``A_near`` and
    ``B_near`` have cancelled and are too small to make ``W``, ``T`` is the rotation.
    """
    rank = near_A.shape[-2]
    if rank > min(svd.P.shape[-2], svd.Q.shape[-2]):  # A cannot have so many independent rows
        return rotate(*balance(svd, rank), near_A, near_B)
    A, B = _fill(svd, near_A, rank)
    sizes = [x.double().square().sum((-2, -1), keepdim=True).sqrt() for x in (near_A, near_B, A, B)]
    sound = sizes[0] * sizes[1] >= CANCELLED * sizes[2] * sizes[3]
    objective = _Objective.of(A, B, torch.where(sound, near_A, A), torch.where(sound, near_B, B))
    T = objective.start()
    f = objective.value(T)
    for _ in range(STEPS):
        before = f
        T, f = objective.step(T, f)
        if bool((before - f <= SETTLED * before).all()):
            break
    nearest = T.to(A.dtype) @ A, B @ torch.linalg.inv(T).to(B.dtype)
    if bool(sound.all()):
        return nearest
    rotation = rotate(A, B, near_A, near_B)
    return torch.where(sound, nearest[0], rotation[0]), torch.where(sound, nearest[1], rotation[1])


class _Objective(NamedTuple):
    """``f(T)`` by ``r × r`` products in float64; the weight's own sizes are not needed any more."""

    AA: Tensor  # A Aᵀ
    NA: Tensor  # A_near Aᵀ
    BB: Tensor  # Bᵀ B
    BN: Tensor  # Bᵀ B_near
    a: Tensor  # ‖A_near‖²
    b: Tensor  # ‖B_near‖²

    @classmethod
    def of(cls, A: Tensor, B: Tensor, near_A: Tensor, near_B: Tensor) -> "_Objective":
        a, b = (x.double().square().sum((-2, -1), keepdim=True) for x in (near_A, near_B))
        b = torch.where(b > 0, b, B.double().square().sum((-2, -1), keepdim=True)).clamp_min(1e-300)
        AA, NA, BB, BN = (x.double() for x in (A @ A.mT, near_A @ A.mT, B.mT @ B, B.mT @ near_B))
        return cls(AA, NA, BB, BN, a.clamp_min(1e-300), b)

    def start(self) -> Tensor:
        """The best of the rotation, ``A_near A⁺`` and ``(B⁺ B_near)⁻¹``."""
        rotation = polar(self.NA / self.a.sqrt() + self.BN.mT / self.b.sqrt())[0]
        by_A = self.NA @ torch.linalg.pinv(self.AA, rtol=CUT, hermitian=True)
        by_B = torch.linalg.pinv(torch.linalg.pinv(self.BB, rtol=CUT, hermitian=True) @ self.BN, rtol=ILL)
        best, least = rotation, self.value(rotation)
        for T in (by_A, by_B):
            s = torch.linalg.svdvals(T)
            sound = (s[..., -1] > ILL * s[..., 0])[..., None, None]
            f = self.value(torch.where(sound, T, rotation))
            best, least = torch.where(sound & (f < least), T, best), torch.minimum(f, least)
        return best

    def value(self, T: Tensor) -> Tensor:
        """``f(T)``."""
        back = torch.linalg.inv(T)
        A = (T @ self.AA * T).sum((-2, -1), keepdim=True) - 2 * (T * self.NA).sum((-2, -1), keepdim=True)
        B = (self.BB @ back * back).sum((-2, -1), keepdim=True) - 2 * (back * self.BN).sum((-2, -1), keepdim=True)
        distance: Tensor = A / self.a + B / self.b + 2
        return distance

    def step(self, T: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """``T ← (I + t X) T`` with the first ``t`` that lowers ``f``; ``X`` solves a Sylvester equation."""
        back = torch.linalg.inv(T)
        AA, NA = T @ self.AA @ T.mT / self.a, self.NA @ T.mT / self.a
        BB, BN = back.mT @ self.BB @ back / self.b, back.mT @ self.BN / self.b
        (p, E), (q, F) = torch.linalg.eigh(BB), torch.linalg.eigh(AA)
        scale = (p[..., :, None] + q[..., None, :]).clamp_min(1e-300)
        X = E @ ((E.mT @ (NA - AA + BB - BN) @ F) / scale) @ F.mT
        eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        best, least = T, f
        for t in (1.0, 0.5, 0.25, 0.0625):
            tried = (eye + t * X) @ T
            value = self.value(tried)
            best, least = torch.where(value < least, tried, best), torch.fmin(value, least)
            if bool((least < f).all()):
                break
        return best, least


def balance(svd: SVD, rank: int) -> Pair:
    """Factors with ``√S`` on both sides, padded with zeros to ``rank``."""
    U, V = svd.factors()
    more = rank - V.shape[-2]
    return functional.pad(V, (0, 0, 0, more)), functional.pad(U, (0, more))


def _fill(svd: SVD, near_A: Tensor, rank: int) -> Pair:
    """Balanced factors of ``W``; spare rows of ``A`` are directions of ``near_A``, with zeros in ``B``."""
    P, S, Q = svd
    rounding = torch.finfo(S.dtype).eps * max(P.shape[-2], Q.shape[-2])
    live = (S / S[..., :1].clamp_min(1e-30)) > rounding
    if S.shape[-1] == rank and bool(live.all()):
        return balance(svd, rank)
    A, B = balance(SVD(P, S * live, Q * live[..., None, :]), rank)
    known = (Q * live[..., None, :]).double()
    rest = near_A.double() - (near_A.double() @ known) @ known.mT
    size, more = torch.linalg.svd(rest, full_matrices=False)[1:]
    order, count = torch.arange(rank, device=A.device), live.sum(-1, keepdim=True)
    index = (order - count).clamp(0)
    spare = (size[..., :, None] * more).gather(-2, index[..., :, None].expand(*index.shape, more.shape[-1])).to(A.dtype)
    return torch.where((order < count)[..., :, None], A, spare), B


def refine(terms: Sequence[Term], A: Tensor, B: Tensor, sweeps: int) -> Pair:
    """Refine ``A`` and ``B`` by alternating least squares for ``min ‖W − B A‖_F``.

    A half-sweep is two passes and an ``r × r`` solve, and none can raise the error. In the singular directions of a
    normal matrix, the factor stays the same.
    """
    wide = regroup(terms)
    for _ in range(sweeps):
        B = B + _correction(apply(wide, A.mT), B, A @ A.mT)
        A = A + _correction(apply_transpose(wide, B), A.mT, B.mT @ B).mT
    return A, B


def _correction(image: Tensor, now: Tensor, G: Tensor) -> Tensor:
    """``(image − now G) G⁺``: the step from ``now`` to the least-squares factor."""
    inverse = torch.linalg.pinv(G.double(), rtol=CUT if G.dtype == torch.float64 else CUT_SINGLE, hermitian=True)
    step: Tensor = (image - now @ G) @ inverse.to(now.dtype)
    return step
