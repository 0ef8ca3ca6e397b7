"""The best mixes of given factors, by passes over them: ``O(K)`` instead of the Gram matrices' ``O(K²)``.

The same sweeps as in ``mixing``, for many clients. They stay in the factors' precision, and work on their differences
from the mean, so that nothing that matters is a small difference of large sums. ``best_mixes`` takes the cheaper way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlora.linalg.factors import polar
from fedlora.linalg.least_squares import AGREE, CLOSER, Atoms, Grams, agreement, als, balanced, gram
from fedlora.linalg.sums import Lazy

ITERATIONS = 60  # of conjugate gradients in a half-sweep, at most
SOLVED = 1e-2  # relative residual at which they stop: the next sweep starts from a gradient taken anew
GAINED = 1e-9  # by passes, where the error itself is not known: the same, of all that the sweeps have gained so far
PASS_SINGLES, PASS_FINALISTS, PASS_TRIAL = 16, 3, 3  # the same by passes, where starts run one after the other
USUAL = 10  # sweeps and tests of the passes against which the Gram matrices are weighed
GRAM_ROWS = 2048  # clients times rank up to which turned frames are solved in Gram space, whatever is cheaper else


class _Side(ABC):
    """One side's factors ``X_k``, rows along the long direction: their mean ``X̄`` and what lies beside it."""

    mean: Tensor  # *stack m r

    @abstractmethod
    def squares(self) -> Tensor:
        """``‖X_k − X̄‖²`` for every k."""

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

    def squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.flat, dim=-1).double().square()

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

    def squares(self) -> Tensor:
        return self._each(lambda x: torch.linalg.matrix_norm(x).double().square(), -1)

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
    """From FedIT's weights; where the clients' frames are turned, from a few single clients and their mean as well."""
    start = w.expand(*B.mean.shape[:-2], -1)
    p, q, error = _swept(B, A, start, w, sweeps)
    turned = _turned(B, A, w)
    if not (sweeps and len(w) > 1 and bool(turned.any())):
        return p, q
    size = error.abs()
    for other in _pass_starts(B, A, w, sweeps):
        found = _swept(B, A, other, w, sweeps)
        better = turned & (found[2] < error - 1e-9 * size)
        p, q = (torch.where(better[..., None], new, old) for new, old in zip(found, (p, q)))
        error = torch.where(better, found[2], error)
    return p, q


def _turned(B: _Side, A: _Side, w: Tensor) -> Tensor:
    """``mixing.turned`` by passes."""
    least = torch.finfo(B.mean.dtype).tiny
    means = [torch.linalg.matrix_norm(X.mean).double().square() for X in (B, A)]
    each = [(mean + (w * X.squares()).sum(-1)).clamp_min(least) for mean, X in zip(means, (B, A))]
    apart = ~(agreement(torch.stack(means), torch.stack(each)) >= AGREE)
    if not bool(apart.any()):
        return apart
    largest = torch.eye(len(w), dtype=w.dtype, device=w.device)[_shares(B, A, w).argmax(-1)]
    tops = [_mixed(X, largest) / size.to(X.mean.dtype)[..., None, None] for X, size in zip((B, A), each)]
    crossed = [X.against(Y) + (X.mean.mT @ Y)[..., None, :, :] for X, Y in zip((B, A), tops)]
    T = w.to(B.mean.dtype)[:, None, None] * polar(crossed[0] + crossed[1])[0]
    rotated = [torch.linalg.matrix_norm(X.crossed(T) + X.mean @ T.sum(-3)).double().square() for X in (B, A)]
    return apart & (rotated[0] / each[0] + rotated[1] / each[1] > CLOSER * (means[0] / each[0] + means[1] / each[1]))


def _shares(B: _Side, A: _Side, w: Tensor) -> Tensor:
    """``w_k ‖B_k‖ ‖A_k‖`` for every k."""
    norms = [X.squares() + 2 * X.inner(X.mean) + X.mean.square().sum((-2, -1))[..., None] for X in (B, A)]
    return w * (norms[0].clamp_min(0) * norms[1].clamp_min(0)).sqrt()


def _pass_starts(B: _Side, A: _Side, w: Tensor, sweeps: int) -> list[Tensor]:
    """Of the clients with the largest share of the target, each alone, those that are the best after a few sweeps."""
    largest = _shares(B, A, w).argsort(dim=-1, descending=True)[..., :PASS_SINGLES]
    alone = torch.eye(len(w), dtype=w.dtype, device=w.device)
    starts = alone[largest].unbind(-2)
    tried = torch.stack([_swept(B, A, start, w, min(PASS_TRIAL, sweeps))[2] for start in starts], dim=-1)
    best = largest.gather(-1, tried.argsort(dim=-1, stable=True)[..., :PASS_FINALISTS])
    return list(alone[best].unbind(-2))


def _swept(B: _Side, A: _Side, start: Tensor, w: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sweeps from ``p = q = start`` until they change nothing; and the squared error, less the target's."""
    p = q = start
    error = gained = torch.zeros_like(start[..., 0])
    rounding = 100 * torch.finfo(B.mean.dtype).eps ** 2
    for _ in range(sweeps):
        step, down, _ = _move(B, A, p, q, w)
        p = p + step
        step, more, error = _move(A, B, q, p, w)
        p, q = balanced(p, q + step)
        gained = gained + down + more
        if bool((down + more <= GAINED * gained + rounding * error.abs()).all()):
            break
    return p, q, error


def _move(X: _Side, Y: _Side, p: Tensor, q: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the least-squares ``p`` differs by, for ``min_p ‖Σ w_k X_k Y_kᵀ − (Σ p_k X_k) Y_qᵀ‖``; by how much the
    squared error falls; and what it is then, less the target's.

    The gradient is ``⟨X_k, T⟩`` with ``T = Σ w_j X'_j (Y'_jᵀ Y_q) + X̄ (Ȳᵀ Y_q − σ H) − X'_p H``, primes for what lies
    beside the mean, ``σ = Σ p_k`` and ``H = Y_qᵀ Y_q``: every term is as small as what it stands for.
    """
    Yq = _mixed(Y, q)
    H = Yq.mT @ Yq
    C = w.to(H.dtype)[:, None, None] * Y.against(Yq)
    sigma = p.sum(-1).to(H.dtype)[..., None, None]
    beside = X.beside(p)
    T = X.crossed(C) + X.mean @ (Y.mean.mT @ Yq - sigma * H) - beside @ H
    gradient = _inner(X, T)
    Xp = sigma * X.mean + beside
    error = -2 * (p * gradient).sum(-1) - ((Xp.mT @ Xp) * H).sum((-2, -1), dtype=torch.float64)
    step = _conjugate_gradients(lambda d: _inner(X, _mixed(X, d) @ H), gradient)
    down = (step * gradient).sum(-1)
    return step, down, error - down


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
    K, r = atoms.A.shape[-3:-1]
    if 4 * K * r <= USUAL * (6 * r + 64):  # multiply-adds of either, over (m + n) K r
        return _by_grams(atoms, sweeps)
    B, A = _Held(atoms.B, atoms.w), _Held(atoms.A.mT, atoms.w)
    if K * r <= GRAM_ROWS and bool(_turned(B, A, atoms.w).any()):  # many sweeps from many starts: cheap only there
        return _by_grams(atoms, sweeps)
    return _alternated(B, A, atoms.w, sweeps)


def _by_grams(atoms: Atoms, sweeps: int) -> tuple[Tensor, Tensor]:
    *stack, K, r, _ = atoms.A.shape
    flat = Grams(*(side.reshape(-1, K, K, r, r) for side in gram(atoms)))
    p, q = als(flat, atoms.w, False, sweeps)
    return p.reshape(*stack, K), q.reshape(*stack, K)
