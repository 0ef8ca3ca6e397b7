"""Sums of many low-rank products, ``W = Σ c_k U_k V_k``, handled product by product.

Nothing here forms an ``m × n`` matrix, and nothing but ``stacked`` copies the factors: each function is one or more
passes over them, so a sequence that reads its factors from disk as they are asked for needs the memory of one.
All take leading dimensions (``*stack``), like ``linalg``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.factors import core
from fedlora.types import Factors

OVERSAMPLE = 8  # columns beyond the rank: they make the range finder's error close to the best (Halko et al. 2011)
ROUNDS, STEADY = 6, 0.98  # of the range finder at most; the share of the leading directions that ends them
EXACT_FLOPS = 5e8  # a QR of the whole stack is taken up to here; beyond, passes over the products are cheaper
WIDE = 128  # products are taken together up to this inner rank: narrow ones do not keep a processor busy
GRAM_RANK, PROBES = 2048, 64
HELD = 64 * 2**20  # numbers; a larger sum is put together anew at every pass instead of being held


class Term(NamedTuple):
    """``c U V``: one client's share of a sum. The scalar stays apart, so that no factor is copied to be scaled."""

    c: float
    U: Float[Tensor, "*stack m r"]
    V: Float[Tensor, "*stack r n"]


Item = TypeVar("Item")


class Lazy(Sequence[Item]):
    """A sequence whose items are made when they are asked for, at every pass anew."""

    def __init__(self, many: int, make: Callable[[int], Item]):
        self.many, self.make = many, make

    def __len__(self) -> int:
        return self.many

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.many:
            raise IndexError(i)
        return self.make(i)


class SVD(NamedTuple):
    """``P diag(S) Qᵀ``: orthonormal columns, and singular values in falling order."""

    P: Float[Tensor, "*stack m p"]
    S: Float[Tensor, "*stack p"]
    Q: Float[Tensor, "*stack n p"]

    def factors(self) -> Factors:
        """``√S`` on both sides."""
        root = self.S.sqrt()
        return Factors(self.P * root[..., None, :], root[..., :, None] * self.Q.mT)


def stacked(terms: Iterable[Term]) -> Factors:
    """The sum as one product of stacks, ``[c_1 U_1 … c_K U_K] [V_1; …; V_K]``."""
    found = list(terms)
    return Factors(torch.cat([t.c * t.U for t in found], dim=-1), torch.cat([t.V for t in found], dim=-2))


def widened(terms: Iterable[Term]) -> Iterator[Term]:
    """The same sum in fewer, wider terms."""
    group: list[Term] = []
    for term in terms:
        group.append(term)
        if sum(t.V.shape[-2] for t in group) >= WIDE:
            yield _joined(group)
            group = []
    if group:
        yield _joined(group)


def _joined(group: Sequence[Term]) -> Term:
    return group[0] if len(group) == 1 else Term(1.0, *stacked(group))


def applied(terms: Iterable[Term], X: Float[Tensor, "*stack n p"]) -> Float[Tensor, "*stack m p"]:
    """``W X``, one pass."""
    return _sum(t.U @ (t.c * (t.V @ X)) for t in terms)


def applied_back(terms: Iterable[Term], Y: Float[Tensor, "*stack m p"]) -> Float[Tensor, "*stack n p"]:
    """``Wᵀ Y``, one pass."""
    return _sum(t.V.mT @ (t.c * (t.U.mT @ Y)) for t in terms)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    rest = iter(terms)
    found = next(rest)
    for term in rest:
        found = found + term
    return found


class _Wide:
    """Wide terms made at every pass; nothing is held between passes."""

    def __init__(self, terms: Iterable[Term]):
        self.terms = terms

    def __iter__(self) -> Iterator[Term]:
        return widened(self.terms)


def held(terms: Sequence[Term]) -> Iterable[Term]:
    """Wide terms for several passes: put together once where there is room for a copy, and at each pass otherwise."""
    first = terms[0]
    size = len(terms) * (first.U.numel() + first.V.numel())
    return list(widened(terms)) if size <= HELD else _Wide(terms)


def best(terms: Sequence[Term], rank: int, start: Float[Tensor, "*stack n r"] | None = None) -> SVD:
    """The leading ``rank`` singular triples of ``W``: exact where the stack is small, else by ``ranged``.

    ``start`` holds directions that the range finder begins with; FedIT's ``Āᵀ`` makes its result at least as near
    to ``W`` as FedIT's own product, whatever else it finds.
    """
    m, n, R = terms[0].U.shape[-2], terms[0].V.shape[-1], len(terms) * terms[0].V.shape[-2]  # for the cost, R is enough
    flops = 4 * (m + n) * R * (min(R, m) + min(R, n))
    small = flops <= EXACT_FLOPS or 2 * (rank + OVERSAMPLE) >= R
    return exact(stacked(terms), rank) if small else ranged(terms, rank, start)


def exact(f: Factors, rank: int) -> SVD:
    """Two QR factorisations and a small SVD (Eckart and Young 1936)."""
    Qu, C, Qv = core(f)
    P, S, Qt = torch.linalg.svd(C, full_matrices=False)
    return SVD(Qu @ P[..., :, :rank], S[..., :rank], Qv @ Qt[..., :rank, :].mT)


def ranged(
    terms: Sequence[Term], rank: int, start: Tensor | None = None, power: int | None = None, seed: int = 0
) -> SVD:
    """The range finder with subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).

    The error is that of the best approximation whose columns lie in the subspace found; no round can make it larger.
    Rounds (two passes each) end when the leading directions lie in the last round's subspace, after at most ``power``.
    Started from FedIT's ``Āᵀ``, one round comes within 1e-6 of the best error where clients are as near to each other
    as after a round of training. Draws come from ``seed``.
    """
    wide, n = held(terms), terms[0].V.shape[-1]
    X = orthonormal(_started(terms[0].V, start, rank, seed)[..., : min(terms[0].U.shape[-2], n)])
    for _ in range(power or ROUNDS):
        Y = orthonormal(applied(wide, X))
        Z = applied_back(wide, Y)  # Yᵀ W, transposed: both the next start and the core
        S, E = _gram_basis(Z)
        Q = (Z.double() @ (E * _inverse(S, Z.dtype)[..., None, :]))[..., :rank].to(Z.dtype)
        there = (X.mT @ Q).square().sum((-2, -1)) >= STEADY * Q.square().sum((-2, -1))
        if bool(there.all()):
            break
        X = orthonormal(Z)
    return SVD((Y.double() @ E)[..., :rank].to(Z.dtype), S[..., :rank].to(Z.dtype), Q)


def _started(like: Tensor, start: Tensor | None, rank: int, seed: int) -> Tensor:
    """The directions to begin with: those that are known, and draws for what is missing or vanishes."""
    known = 0 if start is None else start.shape[-1]
    more = max(OVERSAMPLE, rank + OVERSAMPLE - known)
    draws: Tensor = torch.randn(like.shape[-1], known + more, generator=torch.Generator().manual_seed(seed)).to(like)
    draws = (draws / like.shape[-1] ** 0.5).expand(*like.shape[:-2], *draws.shape)
    if start is None:
        return draws
    first = orthonormal(start)
    empty = first.square().sum(-2, keepdim=True) == 0
    found: Tensor = torch.cat([torch.where(empty, draws[..., :known], first), draws[..., known:]], dim=-1)
    return found


def orthonormal(Y: Float[Tensor, "*stack m p"]) -> Float[Tensor, "*stack m p"]:
    """Orthonormal columns that span ``Y``'s, and zeros for what it lacks; several times faster than a tall QR."""
    S, E = _gram_basis(Y)
    return (Y.double() @ (E * _inverse(S, Y.dtype)[..., None, :])).to(Y.dtype)


def _inverse(S: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / S``, and 0 for what is rounding error in factors of ``dtype``."""
    tiny = torch.finfo(S.dtype).tiny
    there = S / S[..., :1].clamp_min(tiny) > torch.finfo(dtype).eps
    found: Tensor = torch.where(there, 1 / S.clamp_min(tiny), torch.zeros_like(S))
    return found


def _gram_basis(X: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (falling) and right singular vectors of a tall ``X``, from its Gram matrix in float64."""
    tall = X.double()
    values, vectors = torch.linalg.eigh(tall.mT @ tall)
    return values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)


def distances(terms: Sequence[Term], others: Sequence[Sequence[Term]]) -> tuple[float, list[float]]:
    """``‖W‖_F``, and how far each other sum lies from ``W``, relative to it (0 where ``W`` is zero).

    From Gram matrices in float64, which resolve relative errors down to about 1e-7; for stacks beyond ``GRAM_RANK``
    from ``PROBES`` random directions, which estimate the norm to a fifth and the ratios to a few percent.
    """
    squared = _squared if len(terms) * terms[0].V.shape[-2] <= GRAM_RANK else _probed
    norm = squared(terms) ** 0.5
    away = [squared(_less(terms, other)) ** 0.5 for other in others]
    return norm, [x / norm if norm > 0 else 0.0 for x in away]


def _less(terms: Sequence[Term], other: Sequence[Term]) -> Sequence[Term]:
    """``W − other``, with the terms of ``W`` as lazy as they were."""
    K = len(terms)
    return Lazy(K + len(other), lambda i: terms[i] if i < K else other[i - K]._replace(c=-other[i - K].c))


def sizes(terms: Sequence[Term]) -> Float[Tensor, "K *stack"]:
    """``‖c_k U_k V_k‖_F`` of every term, from its own small Gram matrices: nothing is subtracted."""
    squares = [((t.U.mT @ t.U).double() * (t.V @ t.V.mT).double()).sum((-2, -1)) * t.c**2 for t in terms]
    return torch.stack(squares).clamp_min(0).sqrt()


def _squared(terms: Sequence[Term]) -> float:
    """``‖Σ c U V‖²_F = Σ_kl c_k c_l tr(U_kᵀ U_l V_l V_kᵀ)``."""
    U, V = stacked(t._replace(U=t.U.double(), V=t.V.double()) for t in terms)
    return max(0.0, float(((U.mT @ U) * (V @ V.mT)).sum()))


def _probed(terms: Sequence[Term]) -> float:
    """``E ‖W ω‖² = ‖W‖²_F`` for directions ``ω`` of independent unit normals."""
    V = terms[0].V
    draws = torch.randn(V.shape[-1], PROBES, generator=torch.Generator().manual_seed(0)).to(V)
    return float(applied(held(terms), draws).double().square().sum()) / PROBES
