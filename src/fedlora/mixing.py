"""The best mixes of given factors: ``min_{p,q} ‖Σ w_k B_k A_k − (Σ p_k B_k)(Σ q_k A_k)‖_F``.

Alternating least squares, in two ways to the same answer. In Gram space (``als``) all pairwise products are taken once,
in float64, and then no long vector is touched any more: best for few clients. ``passes`` goes over the factors in every
half-sweep, which costs ``O(K)`` instead of ``O(K²)``: best for many. It stays in the factors' precision, and works on
their differences from the mean, so that nothing that matters is a small difference of large sums.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

CUT = 1e-12  # relative: below it a direction of the normal matrix is rounding error
STILL = 1e-5  # relative: a sweep that moves the mixes by less is the last one; the error is flat to its square there
ITERATIONS = 60  # of conjugate gradients in a half-sweep, at most
SOLVED = 1e-2  # relative residual at which they stop: the next sweep starts from a gradient taken anew


class Atoms(NamedTuple):
    """What may be mixed, and the weights of the target ``Σ w_k B_k A_k``."""

    A: Float[Tensor, "*stack K r n"]
    B: Float[Tensor, "*stack K m r"]
    w: Float[Tensor, "K"]


class Grams(NamedTuple):
    """``B[k, l] = B_kᵀ B_l`` and ``A[k, l] = A_k A_lᵀ``, in float64: the objective is a small difference of them."""

    B: Float[Tensor, "*stack K K r r"]
    A: Float[Tensor, "*stack K K r r"]


Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # p, q -> the next p, q


def gram(atoms: Atoms) -> Grams:
    """All pairwise products, as one GEMM a side."""
    A, B = atoms.A.double(), atoms.B.double()
    *stack, K, r, n = A.shape
    A = A.reshape(*stack, K * r, n)
    B = B.transpose(-3, -2).reshape(*stack, B.shape[-2], K * r)
    blocks = (X.reshape(*stack, K, r, K, r).transpose(-3, -2) for X in (B.mT @ B, A @ A.mT))
    return Grams(*blocks)


def normal(G: Tensor, other: Tensor, fixed: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``M (L K K)`` and ``b (L K)`` of the least squares for the mix of ``G``'s side, the other side's mix ``fixed``.

    For ``p``: ``M_kl = tr(G_B[k,l] H)`` with ``H = Σ q_k q_l G_A[k,l]``, ``b_k = Σ_j w_j tr(G_B[k,j] C_j)`` with
    ``C_j = Σ_l q_l G_A[j,l]``. For ``q`` the roles are exchanged, and the traces pair transposed blocks.
    """
    C = torch.einsum("...l,...klij->...kij", fixed, other)
    H = torch.einsum("...k,...kij->...ij", fixed, C)
    M = torch.einsum("...klij,...ji->...kl", G, H)
    b = torch.einsum("j,...kjab,...jba->...k", w, G, C)
    return M, b


def als(grams: Grams, w: Tensor, whole_model: bool, sweeps: int) -> tuple[Tensor, Tensor]:
    """From ``p = q = w``; each half-sweep can only lower the error. Stops early where nothing moves any more."""

    def sweep(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        p = _step(p, *normal(grams.B, grams.A, q, w), whole_model)
        return p, _step(q, *normal(grams.A, grams.B, p, w), whole_model)

    start = w.expand(len(grams.B), -1)
    return swept(sweep, start, sweeps)


def swept(sweep: Solve, start: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Sweeps from ``p = q = start`` until the mixes stand still."""
    p = q = start
    for _ in range(sweeps):
        before = torch.stack([p, q])
        p, q = balanced(*sweep(p, q))
        after = torch.stack([p, q])
        if bool((after - before).abs().max() <= STILL * after.abs().max()):
            break
    return p, q


def _step(p: Tensor, M: Tensor, b: Tensor, whole_model: bool) -> Tensor:
    """The least-squares solution nearest to ``p``: where ``M`` is singular, ``p`` stays."""
    if whole_model:
        M, b = M.sum(0, keepdim=True), b.sum(0, keepdim=True)
    rest = b - (M @ p[: len(M), :, None])[..., 0]
    found: Tensor = p + (torch.linalg.pinv(M, rtol=CUT, hermitian=True) @ rest[..., None])[..., 0]
    return found


def balanced(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ``Σ p = Σ q``, where both sums have one sign; so neither side grows unseen."""
    ratio = q.sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
    c = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
    return p * c, q / c


class _Side(NamedTuple):
    """One side's factors, turned so that rows are the long direction: their mean, and what lies beside it."""

    mean: Float[Tensor, "*stack m r"]
    rest: Float[Tensor, "*stack K m r"]  # X_k − X̄, so that Σ w_k rest_k = 0

    @classmethod
    def of(cls, X: Tensor, w: Tensor) -> "_Side":
        mean = torch.einsum("k,...kmr->...mr", w.to(X.dtype), X)
        return cls(mean, X - mean[..., None, :, :])

    def mixed(self, p: Tensor) -> Tensor:
        """``Σ p_k X_k``."""
        return p.sum(-1).to(self.mean.dtype)[..., None, None] * self.mean + self.beside(p)

    def beside(self, p: Tensor) -> Tensor:
        """``Σ p_k (X_k − X̄)``."""
        *stack, K, m, r = self.rest.shape
        flat: Tensor = p.to(self.rest.dtype)[..., None, :] @ self.rest.reshape(*stack, K, m * r)
        return flat.reshape(*stack, m, r)

    def inner(self, Y: Tensor) -> Tensor:
        """``⟨X_k, Y⟩`` for every k, float64."""
        *stack, K, m, r = self.rest.shape
        own = (self.rest.reshape(*stack, K, m * r) @ Y.reshape(*stack, m * r, 1))[..., 0]
        found: Tensor = own.double() + (self.mean * Y).sum((-2, -1), dtype=torch.float64)[..., None]
        return found


def passes(atoms: Atoms, sweeps: int) -> tuple[Tensor, Tensor]:
    """The same sweeps by passes over the factors, with conjugate gradients for the ``K × K`` systems."""
    w = atoms.w
    B, A = _Side.of(atoms.B, w), _Side.of(atoms.A.mT, w)

    def sweep(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        p = p + _move(B, A, p, q, w)
        return p, q + _move(A, B, q, p, w)

    return swept(sweep, w.expand(*atoms.B.shape[:-3], -1), sweeps)


def _move(X: _Side, Y: _Side, p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """What the least-squares ``p`` differs by, for ``min_p ‖Σ w_k X_k Y_kᵀ − (Σ p_k X_k) Y_qᵀ‖``.

    The gradient is ``⟨X_k, T⟩`` with ``T = Σ w_j X'_j (Y'_jᵀ Y_q) + X̄ (Ȳᵀ Y_q − σ H) − X'_p H``, primes for what lies
    beside the mean, ``σ = Σ p_k`` and ``H = Y_qᵀ Y_q``: every term is as small as what it stands for.
    """
    Yq = Y.mixed(q)
    H = Yq.mT @ Yq
    C = Y.rest.mT @ Yq[..., None, :, :]  # k r r
    *stack, K, m, r = X.rest.shape
    wide = (w.to(C.dtype)[:, None, None] * C).reshape(*stack, K * r, r)
    crossed = X.rest.transpose(-3, -2).reshape(*stack, m, K * r) @ wide
    sigma = p.sum(-1).to(H.dtype)[..., None, None]
    T = crossed + X.mean @ (Y.mean.mT @ Yq - sigma * H) - X.beside(p) @ H
    return _conjugate_gradients(lambda d: X.inner(X.mixed(d) @ H), X.inner(T))


def _conjugate_gradients(times: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """``M x = b`` for a positive semidefinite ``M`` and a ``b`` in its range, from zero; many systems at once."""
    x, rest, way = torch.zeros_like(b), b, b
    size = first = b.square().sum(-1, keepdim=True)
    for _ in range(min(ITERATIONS, 2 * b.shape[-1])):
        if bool((size <= SOLVED**2 * first).all()):
            break
        image = times(way)
        curve = (way * image).sum(-1, keepdim=True)
        step = torch.where(curve > 0, size / curve.clamp_min(1e-300), torch.zeros_like(curve))
        x, rest = x + step * way, rest - step * image
        before, size = size, rest.square().sum(-1, keepdim=True)
        way = rest + size / before.clamp_min(1e-300) * way
    return x


def best_mixes(atoms: Atoms, sweeps: int) -> tuple[Tensor, Tensor]:
    """``p`` and ``q`` (``*stack K``), by whichever way is cheaper for this many clients."""
    *stack, K, r, _ = atoms.A.shape
    if 4 * K * r <= sweeps * (6 * r + 64):  # multiply-adds of either, over (m + n) K r
        grams = gram(atoms)
        flat = Grams(*(side.reshape(-1, K, K, r, r) for side in grams))
        p, q = als(flat, atoms.w, False, sweeps)
        return p.reshape(*stack, K), q.reshape(*stack, K)
    return passes(atoms, sweeps)
