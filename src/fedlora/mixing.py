"""The best mixes of given factors: ``min_{p,q} ‖Σ w_k B_k A_k − (Σ p_k B_k)(Σ q_k A_k)‖_F``.

Alternating least squares, in two ways to the same answer. In Gram space (``als``) all pairwise products are taken once,
in float64, and then no long vector is touched any more: best for few clients. ``passes`` goes over the factors in every
half-sweep, which costs ``O(K)`` instead of ``O(K²)``: best for many. It stays in the factors' precision, and works on
their differences from the mean, so that nothing that matters is a small difference of large sums.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg import einsum
from fedlora.products import Lazy

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
    """All pairwise products, as one GEMM a side in the factors' precision.

    Taken of the mean and of what lies beside it, and put together in float64: rounding is then as small as either.
    """
    return Grams(_pairs(atoms.B.mT, atoms.w), _pairs(atoms.A, atoms.w))


def _pairs(X: Tensor, w: Tensor) -> Tensor:
    """``X_k X_lᵀ`` for all pairs of ``X (K r n)``, float64."""
    *stack, K, r, n = X.shape
    mean = torch.einsum("k,...krn->...rn", w.to(X.dtype), X)[..., None, :, :]
    long = torch.cat([mean, X - mean], dim=-3).reshape(*stack, (K + 1) * r, n)
    S = (long @ long.mT).double().reshape(*stack, K + 1, r, K + 1, r).transpose(-3, -2)
    return S[..., :1, :1, :, :] + S[..., :1, 1:, :, :] + S[..., 1:, :1, :, :] + S[..., 1:, 1:, :, :]


def normal(G: Tensor, other: Tensor, fixed: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``M (L K K)`` and ``b (L K)`` of the least squares for the mix of ``G``'s side, the other side's mix ``fixed``.

    For ``p``: ``M_kl = tr(G_B[k,l] H)`` with ``H = Σ q_k q_l G_A[k,l]``, ``b_k = Σ_j w_j tr(G_B[k,j] C_j)`` with
    ``C_j = Σ_l q_l G_A[j,l]``. For ``q`` the roles are exchanged, and the traces pair transposed blocks.
    """
    C = torch.einsum("...l,...klij->...kij", fixed, other)
    H = torch.einsum("...k,...kij->...ij", fixed, C)
    M = torch.einsum("...klij,...ji->...kl", G, H)
    b = einsum("j,...kjab,...jba->...k", w, G, C)
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


class _Side(ABC):
    """One side's factors ``X_k``, rows along the long direction: their mean ``X̄`` and what lies beside it."""

    mean: Tensor  # *stack m r

    @abstractmethod
    def beside(self, p: Tensor) -> Tensor:
        """``Σ p_k (X_k − X̄)``."""

    @abstractmethod
    def inner(self, Y: Tensor) -> Tensor:
        """``⟨X_k − X̄, Y⟩`` for every k."""

    @abstractmethod
    def against(self, Y: Tensor) -> Tensor:
        """``(X_k − X̄)ᵀ Y`` for every k: ``*stack K r r``."""

    @abstractmethod
    def crossed(self, C: Tensor) -> Tensor:
        """``Σ (X_k − X̄) C_k``."""


class _Held(_Side):
    """All factors in memory, in the two orders that make every pass one GEMM."""

    def __init__(self, X: Tensor, w: Tensor):  # *stack K m r
        *self.stack, self.K, self.m, self.r = X.shape
        self.mean = torch.einsum("k,...kmr->...mr", w.to(X.dtype), X)
        self.rest = (X - self.mean[..., None, :, :]).contiguous()
        self.flat = self.rest.reshape(*self.stack, self.K, self.m * self.r)
        self.wide = self.rest.transpose(-3, -2).reshape(*self.stack, self.m, self.K * self.r)

    def beside(self, p: Tensor) -> Tensor:
        found: Tensor = p.to(self.flat.dtype)[..., None, :] @ self.flat
        return found.reshape(*self.stack, self.m, self.r)

    def inner(self, Y: Tensor) -> Tensor:
        found: Tensor = self.flat @ Y.reshape(*self.stack, self.m * self.r, 1)
        return found[..., 0].double()

    def against(self, Y: Tensor) -> Tensor:
        found: Tensor = self.wide.mT @ Y
        return found.reshape(*self.stack, self.K, self.r, Y.shape[-1])

    def crossed(self, C: Tensor) -> Tensor:
        found: Tensor = self.wide @ C.reshape(*self.stack, self.K * self.r, C.shape[-1])
        return found


class _Streamed(_Side):
    """Factors that are read anew at every pass; nothing is held but their mean."""

    def __init__(self, factors: Sequence[Tensor], w: Tensor):
        self.factors = factors
        self.mean = torch.zeros_like(factors[0])
        self.mean = self._summed(w.expand(*self.mean.shape[:-2], -1))

    def _summed(self, p: Tensor) -> Tensor:
        found = torch.zeros_like(self.mean)
        for k in range(len(self.factors)):
            found = torch.addcmul(found, self.factors[k] - self.mean, p[..., k].to(found.dtype)[..., None, None])
        return found

    def _each(self, of: Callable[[Tensor], Tensor], dim: int) -> Tensor:
        return torch.stack([of(self.factors[k] - self.mean) for k in range(len(self.factors))], dim=dim)

    def beside(self, p: Tensor) -> Tensor:
        return self._summed(p)

    def inner(self, Y: Tensor) -> Tensor:
        return self._each(lambda x: (x * Y).sum((-2, -1)).double(), -1)

    def against(self, Y: Tensor) -> Tensor:
        return self._each(lambda x: x.mT @ Y, -3)

    def crossed(self, C: Tensor) -> Tensor:
        found = torch.zeros_like(self.mean)
        for k in range(len(self.factors)):
            found = found + (self.factors[k] - self.mean) @ C[..., k, :, :]
        return found


def passes(atoms: Atoms, sweeps: int) -> tuple[Tensor, Tensor]:
    """The same sweeps by passes over the factors, with conjugate gradients for the ``K × K`` systems."""
    return _alternated(_Held(atoms.B, atoms.w), _Held(atoms.A.mT, atoms.w), atoms.w, sweeps)


def streamed(A: Sequence[Tensor], B: Sequence[Tensor], w: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """``passes`` over factors ``A_k (r n)`` and ``B_k (m r)`` that are read when they are asked for."""
    return _alternated(_Streamed(B, w), _Streamed(Lazy(len(A), lambda k: A[k].mT), w), w, sweeps)


def _alternated(B: _Side, A: _Side, w: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    def sweep(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        p = p + _move(B, A, p, q, w)
        return p, q + _move(A, B, q, p, w)

    return swept(sweep, w.expand(*B.mean.shape[:-2], -1), sweeps)


def _move(X: _Side, Y: _Side, p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """What the least-squares ``p`` differs by, for ``min_p ‖Σ w_k X_k Y_kᵀ − (Σ p_k X_k) Y_qᵀ‖``.

    The gradient is ``⟨X_k, T⟩`` with ``T = Σ w_j X'_j (Y'_jᵀ Y_q) + X̄ (Ȳᵀ Y_q − σ H) − X'_p H``, primes for what lies
    beside the mean, ``σ = Σ p_k`` and ``H = Y_qᵀ Y_q``: every term is as small as what it stands for.
    """
    Yq = _mixed(Y, q)
    H = Yq.mT @ Yq
    C = w.to(H.dtype)[:, None, None] * Y.against(Yq)
    sigma = p.sum(-1).to(H.dtype)[..., None, None]
    T = X.crossed(C) + X.mean @ (Y.mean.mT @ Yq - sigma * H) - X.beside(p) @ H
    return _conjugate_gradients(lambda d: _inner(X, _mixed(X, d) @ H), _inner(X, T))


def _mixed(X: _Side, p: Tensor) -> Tensor:
    """``Σ p_k X_k``."""
    return p.sum(-1).to(X.mean.dtype)[..., None, None] * X.mean + X.beside(p)


def _inner(X: _Side, Y: Tensor) -> Tensor:
    """``⟨X_k, Y⟩`` for every k, float64."""
    return X.inner(Y) + (X.mean * Y).sum((-2, -1), dtype=torch.float64)[..., None]


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
