"""Matrix-free solver for the best mixes of given factors: ``O(K)`` instead of the Gram matrices' ``O(K²)``.

The same sweeps as in ``least_squares``, for many clients: each makes passes over the factors and solves the ``K × K``
systems by conjugate gradients. They stay in the factors' precision and use deviations from the mean, so no result is a
small difference of large sums. ``solve`` selects the cheaper solver.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlora.linalg.factors import polar
from fedlora.linalg.least_squares import (
    AGREE,
    CLOSER,
    ClientFactors,
    Grams,
    agreement,
    als,
    equalize_sums,
    gram_matrices,
)
from fedlora.linalg.sums import Lazy

ITERATIONS = 60  # of conjugate gradients in a half-sweep, at most
SOLVED = 1e-2  # relative residual at which they stop: the next sweep computes the gradient anew
GAINED = 1e-9  # of the total decrease of the squared error: a sweep that lowers it by less is the last one
SINGLES, FINALISTS, TRIAL = 16, 3, 3  # as in ``least_squares``; fewer, since starts run one after the other
USUAL = 10  # sweeps that the cost of the Gram matrices is compared with
GRAM_ROWS = 2048  # clients times rank up to which rotated frames are always solved from Gram matrices


class _Side(ABC):
    """One side's factors ``X_k (m r)``: their mean ``X̄`` and the deviations from it."""

    mean: Tensor  # *stack m r

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """``‖X_k − X̄‖²`` of every k."""

    @abstractmethod
    def mix(self, p: Tensor) -> Tensor:
        """``Σ p_k (X_k − X̄)``."""

    @abstractmethod
    def inner(self, Y: Tensor) -> Tensor:
        """``⟨X_k − X̄, Y⟩`` of every k."""

    @abstractmethod
    def transposed_products(self, Y: Tensor) -> Tensor:
        """``(X_k − X̄)ᵀ Y`` of every k: ``*stack K r r``."""

    @abstractmethod
    def combine(self, C: Tensor) -> Tensor:
        """``Σ (X_k − X̄) C_k``."""


class _InMemory(_Side):
    """All factors in memory, in the two layouts with which each pass is one matrix product."""

    def __init__(self, X: Tensor, w: Tensor):  # *stack K m r
        *self.stack, self.K, self.m, self.r = X.shape
        self.mean = torch.einsum("k,...kmr->...mr", w.to(X.dtype), X)
        self.rest = (X - self.mean[..., None, :, :]).contiguous()
        self.flat = self.rest.reshape(*self.stack, self.K, self.m * self.r)
        self.wide = self.rest.transpose(-3, -2).reshape(*self.stack, self.m, self.K * self.r)

    def squared_norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.flat, dim=-1).double().square()
        return norms

    def mix(self, p: Tensor) -> Tensor:
        mixed: Tensor = p.to(self.flat.dtype)[..., None, :] @ self.flat
        return mixed.reshape(*self.stack, self.m, self.r)

    def inner(self, Y: Tensor) -> Tensor:
        products: Tensor = self.flat @ Y.reshape(*self.stack, self.m * self.r, 1)
        return products[..., 0].double()

    def transposed_products(self, Y: Tensor) -> Tensor:
        products: Tensor = self.wide.mT @ Y
        return products.reshape(*self.stack, self.K, self.r, Y.shape[-1])

    def combine(self, C: Tensor) -> Tensor:
        combined: Tensor = self.wide @ C.reshape(*self.stack, self.K * self.r, C.shape[-1])
        return combined


class _Streaming(_Side):
    """Factors that are read anew at each pass; only their mean is in memory."""

    def __init__(self, factors: Sequence[Tensor], w: Tensor):
        self.factors = factors
        self.mean = torch.zeros_like(factors[0])
        self.mean = self.mix(w.expand(*self.mean.shape[:-2], -1))

    def _each(self, of: Callable[[Tensor], Tensor], dim: int) -> Tensor:
        return torch.stack([of(self.factors[k] - self.mean) for k in range(len(self.factors))], dim=dim)

    def squared_norms(self) -> Tensor:
        return self._each(lambda x: torch.linalg.matrix_norm(x).double().square(), -1)

    def mix(self, p: Tensor) -> Tensor:
        mixed = torch.zeros_like(self.mean)
        for k in range(len(self.factors)):
            mixed = torch.addcmul(mixed, self.factors[k] - self.mean, p[..., k].to(mixed.dtype)[..., None, None])
        return mixed

    def inner(self, Y: Tensor) -> Tensor:
        return self._each(lambda x: (x * Y).sum((-2, -1)).double(), -1)

    def transposed_products(self, Y: Tensor) -> Tensor:
        return self._each(lambda x: x.mT @ Y, -3)

    def combine(self, C: Tensor) -> Tensor:
        combined = torch.zeros_like(self.mean)
        for k in range(len(self.factors)):
            combined = combined + (self.factors[k] - self.mean) @ C[..., k, :, :]
        return combined


def solve_in_memory(factors: ClientFactors, sweeps: int) -> tuple[Tensor, Tensor]:
    """``p`` and ``q`` (``*stack K``) by at most ``sweeps`` matrix-free sweeps over factors in memory."""
    return _alternate(_InMemory(factors.B, factors.w), _InMemory(factors.A.mT, factors.w), factors.w, sweeps)


def solve_streaming(A: Sequence[Tensor], B: Sequence[Tensor], w: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """The same over factors ``A_k (r n)`` and ``B_k (m r)`` that are read when they are accessed."""
    return _alternate(_Streaming(B, w), _Streaming(Lazy(len(A), lambda k: A[k].mT), w), w, sweeps)


def _alternate(B: _Side, A: _Side, w: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Sweep from FedIT's weights and, if the clients' frames are rotated, also from a few single clients."""
    start = w.expand(*B.mean.shape[:-2], -1)
    p, q, error = _sweep(B, A, start, w, sweeps)
    rotated = _is_rotated(B, A, w)
    if not (sweeps and len(w) > 1 and bool(rotated.any())):
        return p, q
    size = error.abs()
    for other in _single_starts(B, A, w, sweeps):
        fit = _sweep(B, A, other, w, sweeps)
        better = rotated & (fit[2] < error - 1e-9 * size)
        p, q = (torch.where(better[..., None], new, old) for new, old in zip(fit, (p, q)))
        error = torch.where(better, fit[2], error)
    return p, q


def _is_rotated(B: _Side, A: _Side, w: Tensor) -> Tensor:
    """``least_squares.is_rotated`` by passes."""
    least = torch.finfo(B.mean.dtype).tiny
    means = [torch.linalg.matrix_norm(X.mean).double().square() for X in (B, A)]
    each = [(mean + (w * X.squared_norms()).sum(-1)).clamp_min(least) for mean, X in zip(means, (B, A))]
    apart = ~(agreement(torch.stack(means), torch.stack(each)) >= AGREE)
    if not bool(apart.any()):
        return apart
    largest = torch.eye(len(w), dtype=w.dtype, device=w.device)[_shares(B, A, w).argmax(-1)]
    tops = [_mix(X, largest) / size.to(X.mean.dtype)[..., None, None] for X, size in zip((B, A), each)]
    crossed = [X.transposed_products(Y) + (X.mean.mT @ Y)[..., None, :, :] for X, Y in zip((B, A), tops)]
    T = w.to(B.mean.dtype)[:, None, None] * polar(crossed[0] + crossed[1])[0]
    rotated = [torch.linalg.matrix_norm(X.combine(T) + X.mean @ T.sum(-3)).double().square() for X in (B, A)]
    closer: Tensor = rotated[0] / each[0] + rotated[1] / each[1] > CLOSER * (means[0] / each[0] + means[1] / each[1])
    return apart & closer


def _shares(B: _Side, A: _Side, w: Tensor) -> Tensor:
    """``w_k ‖B_k‖ ‖A_k‖`` of every k."""
    norms = [X.squared_norms() + 2 * X.inner(X.mean) + X.mean.square().sum((-2, -1))[..., None] for X in (B, A)]
    shares: Tensor = w * (norms[0].clamp_min(0) * norms[1].clamp_min(0)).sqrt()
    return shares


def _single_starts(B: _Side, A: _Side, w: Tensor, sweeps: int) -> list[Tensor]:
    """Single clients to start from: of those with the largest share of the target, the best after a few sweeps."""
    largest = _shares(B, A, w).argsort(dim=-1, descending=True)[..., :SINGLES]
    alone = torch.eye(len(w), dtype=w.dtype, device=w.device)
    starts = alone[largest].unbind(-2)
    tried = torch.stack([_sweep(B, A, start, w, min(TRIAL, sweeps))[2] for start in starts], dim=-1)
    best = largest.gather(-1, tried.argsort(dim=-1, stable=True)[..., :FINALISTS])
    return list(alone[best].unbind(-2))


def _sweep(B: _Side, A: _Side, start: Tensor, w: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep from ``p = q = start`` until nothing changes: ``p``, ``q``, and the squared error minus the target's."""
    p = q = start
    error = gained = torch.zeros_like(start[..., 0])
    rounding = 100 * torch.finfo(B.mean.dtype).eps ** 2
    for _ in range(sweeps):
        step, down, _ = _move(B, A, p, q, w)
        p = p + step
        step, more, error = _move(A, B, q, p, w)
        p, q = equalize_sums(p, q + step)
        gained = gained + down + more
        if bool((down + more <= GAINED * gained + rounding * error.abs()).all()):
            break
    return p, q, error


def _move(X: _Side, Y: _Side, p: Tensor, q: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One half-sweep for ``min_p ‖Σ w_k X_k Y_kᵀ − (Σ p_k X_k) Y_qᵀ‖``: the step from ``p`` to the solution, the
    decrease of the squared error, and the error then, minus the target's.

    The gradient is ``⟨X_k, T⟩`` with ``T = Σ w_j X'_j (Y'_jᵀ Y_q) + X̄ (Ȳᵀ Y_q − σ H) − X'_p H``, where primes are
    deviations from the mean, ``σ = Σ p_k`` and ``H = Y_qᵀ Y_q``. No term is a small difference of large ones.
    """
    Yq = _mix(Y, q)
    H = Yq.mT @ Yq
    C = w.to(H.dtype)[:, None, None] * Y.transposed_products(Yq)
    sigma = p.sum(-1).to(H.dtype)[..., None, None]
    deviation = X.mix(p)
    T = X.combine(C) + X.mean @ (Y.mean.mT @ Yq - sigma * H) - deviation @ H
    gradient = _inner(X, T)
    Xp = sigma * X.mean + deviation
    error = -2 * (p * gradient).sum(-1) - ((Xp.mT @ Xp) * H).sum((-2, -1), dtype=torch.float64)
    step = _conjugate_gradients(lambda d: _inner(X, _mix(X, d) @ H), gradient)
    down = (step * gradient).sum(-1)
    return step, down, error - down


def _mix(X: _Side, p: Tensor) -> Tensor:
    """``Σ p_k X_k``."""
    return p.sum(-1).to(X.mean.dtype)[..., None, None] * X.mean + X.mix(p)


def _inner(X: _Side, Y: Tensor) -> Tensor:
    """``⟨X_k, Y⟩`` of every k, float64."""
    return X.inner(Y) + (X.mean * Y).sum((-2, -1), dtype=torch.float64)[..., None]


def _conjugate_gradients(times: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Solve ``M x = b`` from zero, for a positive semidefinite ``M`` and ``b`` in its range; many systems at once."""
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


def solve_mixes(factors: ClientFactors, sweeps: int) -> tuple[Tensor, Tensor]:
    """``p`` and ``q`` (``*stack K``) by at most ``sweeps`` sweeps of the solver that is cheaper for ``K`` clients."""
    K, r = factors.A.shape[-3:-1]
    if 4 * K * r <= USUAL * (6 * r + 64):  # multiply-adds of each solver, divided by (m + n) K r
        return _by_grams(factors, sweeps)
    B, A = _InMemory(factors.B, factors.w), _InMemory(factors.A.mT, factors.w)
    if K * r <= GRAM_ROWS and bool(_is_rotated(B, A, factors.w).any()):  # many starts are cheap only in Gram matrices
        return _by_grams(factors, sweeps)
    return _alternate(B, A, factors.w, sweeps)


def _by_grams(factors: ClientFactors, sweeps: int) -> tuple[Tensor, Tensor]:
    *stack, K, r, _ = factors.A.shape
    flat = Grams(*(side.reshape(-1, K, K, r, r) for side in gram_matrices(factors)))
    p, q = als(flat, factors.w, False, sweeps)
    return p.reshape(*stack, K), q.reshape(*stack, K)
