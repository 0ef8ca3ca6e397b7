"""Sums of many low-rank products, ``W = Σ c_k U_k V_k``: applied to vectors, and their truncated SVD.

Each function makes one or more passes over the terms. Terms that a ``Lazy`` sequence reads from disk are in memory one
at a time, unless a function stacks a small sum. No function forms an ``m × n`` matrix; all take leading dimensions
(``*stack``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.factors import core
from fedlora.types import Factors

OVERSAMPLE = 8  # columns beyond the rank; with them the randomized SVD is close to the best (Halko et al. 2011)
ROUNDS = 6  # at most, of subspace iteration
STEADY = 0.98  # share of the leading directions within the last round's subspace that ends the iteration
EXACT_FLOPS = 5e8  # up to here the whole stack is factorised; beyond it, passes over the products are cheaper
WIDE = 128  # terms are joined up to this inner rank: narrow products do not keep a processor busy
CACHE_LIMIT = 64 * 2**20  # numbers; a larger sum is regrouped at each pass instead of being held in memory


class Term(NamedTuple):
    """``c U V``, one client's share of a sum. The scalar is separate, so no factor is copied to be scaled."""

    c: float
    U: Float[Tensor, "*stack m r"]
    V: Float[Tensor, "*stack r n"]


Item = TypeVar("Item")


class Lazy(Sequence[Item]):
    """A sequence that computes an item each time it is accessed, and holds none."""

    def __init__(self, many: int, make: Callable[[int], Item]):
        self.many, self.make = many, make

    def __len__(self) -> int:
        return self.many

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.many:
            raise IndexError(i)
        return self.make(i)


class SVD(NamedTuple):
    """``P diag(S) Qᵀ``: orthonormal columns, and singular values in descending order."""

    P: Float[Tensor, "*stack m p"]
    S: Float[Tensor, "*stack p"]
    Q: Float[Tensor, "*stack n p"]

    def factors(self) -> Factors:
        """The product as two factors, with ``√S`` on both sides."""
        root = self.S.sqrt()
        return Factors(self.P * root[..., None, :], root[..., :, None] * self.Q.mT)


def stack(terms: Iterable[Term]) -> Factors:
    """Write the sum as one product of stacks, ``[c_1 U_1 … c_K U_K] [V_1; …; V_K]``."""
    parts = list(terms)
    return Factors(torch.cat([t.c * t.U for t in parts], dim=-1), torch.cat([t.V for t in parts], dim=-2))


def widen(terms: Iterable[Term]) -> Iterator[Term]:
    """Join terms into fewer, wider ones with the same sum."""
    group: list[Term] = []
    for term in terms:
        group.append(term)
        if sum(t.V.shape[-2] for t in group) >= WIDE:
            yield _join(group)
            group = []
    if group:
        yield _join(group)


def _join(group: Sequence[Term]) -> Term:
    return group[0] if len(group) == 1 else Term(1.0, *stack(group))


def apply(terms: Iterable[Term], X: Float[Tensor, "*stack n p"]) -> Float[Tensor, "*stack m p"]:
    """``W X``, in one pass."""
    return _sum(t.U @ (t.c * (t.V @ X)) for t in terms)


def apply_transpose(terms: Iterable[Term], Y: Float[Tensor, "*stack m p"]) -> Float[Tensor, "*stack n p"]:
    """``Wᵀ Y``, in one pass."""
    return _sum(t.V.mT @ (t.c * (t.U.mT @ Y)) for t in terms)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    rest = iter(terms)
    total = next(rest)
    for term in rest:
        total = total + term
    return total


class _Wide:
    """Wide terms that are joined anew at each pass."""

    def __init__(self, terms: Iterable[Term]):
        self.terms = terms

    def __iter__(self) -> Iterator[Term]:
        return widen(self.terms)


def regroup(terms: Sequence[Term]) -> Iterable[Term]:
    """Join terms for several passes: once if the copy is within ``CACHE_LIMIT``, and at each pass otherwise."""
    first = terms[0]
    size = len(terms) * (first.U.numel() + first.V.numel())
    return list(widen(terms)) if size <= CACHE_LIMIT else _Wide(terms)


def truncated_svd(terms: Sequence[Term], rank: int, start: Float[Tensor, "*stack n r"] | None = None) -> SVD:
    """The leading ``rank`` singular triples of ``W``: exact for a small stack, and randomized otherwise.

    ``start`` holds directions that the randomized SVD begins with. With FedIT's ``Āᵀ``, the result is at least as near
    to ``W`` as FedIT's product.
    """
    m, n, R = terms[0].U.shape[-2], terms[0].V.shape[-1], len(terms) * terms[0].V.shape[-2]  # for the cost, R is enough
    flops = 4 * (m + n) * R * (min(R, m) + min(R, n))
    small = flops <= EXACT_FLOPS or 2 * (rank + OVERSAMPLE) >= R
    return exact_svd(stack(terms), rank) if small else randomized_svd(terms, rank, start)


def exact_svd(f: Factors, rank: int) -> SVD:
    """The leading triples by two QR factorisations and a small SVD (Eckart and Young 1936)."""
    Qu, C, Qv = core(f)
    P, S, Qt = torch.linalg.svd(C, full_matrices=False)
    return SVD(Qu @ P[..., :, :rank], S[..., :rank], Qv @ Qt[..., :rank, :].mT)


def randomized_svd(
    terms: Sequence[Term], rank: int, start: Tensor | None = None, power: int | None = None, seed: int = 0
) -> SVD:
    """The leading triples by subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).

    The error is that of the best approximation with columns in the subspace, and no round can raise it. A round is two
    passes. Rounds end when the leading directions lie in the last round's subspace, or after ``power`` rounds. From
    FedIT's ``Āᵀ``, and with clients as near to each other as after a round of training, one round comes within 1e-6 of
    the best error. Random directions come from ``seed``.
    """
    wide, n = regroup(terms), terms[0].V.shape[-1]
    X = orthonormalize(_starting_directions(terms[0].V, start, rank, seed)[..., : min(terms[0].U.shape[-2], n)])
    for _ in range(power or ROUNDS):
        Y = orthonormalize(apply(wide, X))
        Z = apply_transpose(wide, Y)  # Wᵀ Y: both the next start and the core
        S, E = _gram_basis(Z)
        Q = (Z.double() @ (E * _inverse(S, Z.dtype)[..., None, :]))[..., :rank].to(Z.dtype)
        steady = (X.mT @ Q).square().sum((-2, -1)) >= STEADY * Q.square().sum((-2, -1))
        if bool(steady.all()):
            break
        X = orthonormalize(Z)
    return SVD((Y.double() @ E)[..., :rank].to(Z.dtype), S[..., :rank].to(Z.dtype), Q)


def _starting_directions(like: Tensor, start: Tensor | None, rank: int, seed: int) -> Tensor:
    """The directions to begin with: those of ``start``, and random ones for missing or zero columns."""
    known = 0 if start is None else start.shape[-1]
    more = max(OVERSAMPLE, rank + OVERSAMPLE - known)
    draws: Tensor = torch.randn(like.shape[-1], known + more, generator=torch.Generator().manual_seed(seed)).to(like)
    draws = (draws / like.shape[-1] ** 0.5).expand(*like.shape[:-2], *draws.shape)
    if start is None:
        return draws
    first = orthonormalize(start)
    empty = first.square().sum(-2, keepdim=True) == 0
    directions: Tensor = torch.cat([torch.where(empty, draws[..., :known], first), draws[..., known:]], dim=-1)
    return directions


def orthonormalize(Y: Float[Tensor, "*stack m p"]) -> Float[Tensor, "*stack m p"]:
    """Orthonormal columns with ``Y``'s span, and zero columns for missing rank; several times faster than a QR."""
    S, E = _gram_basis(Y)
    return (Y.double() @ (E * _inverse(S, Y.dtype)[..., None, :])).to(Y.dtype)


def _inverse(S: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / S``, and 0 for values that are rounding error in factors of ``dtype``."""
    tiny = torch.finfo(S.dtype).tiny
    sound = S / S[..., :1].clamp_min(tiny) > torch.finfo(dtype).eps
    inverse: Tensor = torch.where(sound, 1 / S.clamp_min(tiny), torch.zeros_like(S))
    return inverse


def _gram_basis(X: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (descending) and right singular vectors of a tall ``X``, from its Gram matrix in float64."""
    tall = X.double()
    values, vectors = torch.linalg.eigh(tall.mT @ tall)
    return values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)
