"""The best mixes of given factors: ``min_{p,q} ‖Σ w_k B_k A_k − (Σ p_k B_k)(Σ q_k A_k)‖_F``, in Gram space.

Alternating least squares, until a sweep changes nothing any more. All pairwise products are taken once, in float64, and
then no long vector is touched any more; ``passes`` has the way for many clients.

The problem has many local optima where clients hold their factors in turned frames (``B_k R_k`` and ``R_kᵀ A_k`` for
rotations ``R_k``): means cancel there, and sweeps from FedIT's weights end far from the best mix. Where neither side's
factors agree, and rotating them makes them agree better, the sweeps also begin at single clients, at principal
components, and at the mean of the factors after each is rotated towards it; the mix with the least error is taken.
Where one side agrees, or factors differ by noise that no rotation takes away, FedIT's weights alone lead to it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.factors import einsum, polar

CUT = 1e-12  # relative: below it a direction of the normal matrix is rounding error
STILL = 1e-6  # relative: a sweep that lowers the squared error by less of it is the last one
ROUNDING = 1e-20  # of the squared norm of the served product: a smaller decrease is rounding error
AGREE = 0.8  # ‖X̄‖² over the mean of ‖X_k‖²: above it on either side, the clients share a frame
CLOSER = 1.05  # what rotating must multiply the sum of both sides' by, or the factors differ by more than their frames
SINGLES, FINALISTS, TRIAL = 32, 8, 5  # clients to begin at, those that go on, and the sweeps that decide which
PRINCIPAL = 4  # principal components to begin at, of each of three kinds


class Atoms(NamedTuple):
    """What may be mixed, and the weights of the target ``Σ w_k B_k A_k``."""

    A: Float[Tensor, "*stack K r n"]
    B: Float[Tensor, "*stack K m r"]
    w: Float[Tensor, "K"]


class Grams(NamedTuple):
    """``B[k, l] = B_kᵀ B_l`` and ``A[k, l] = A_k A_lᵀ``, in float64: the objective is a small difference of them."""

    B: Float[Tensor, "*stack K K r r"]
    A: Float[Tensor, "*stack K K r r"]


class Fit(NamedTuple):
    """Mixes of ``L`` weights from ``S`` starts, and their squared errors, less the target's squared norm."""

    p: Float[Tensor, "L S K"]
    q: Float[Tensor, "L S K"]
    error: Float[Tensor, "L S"]


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
    """``M (L S K K)`` and ``b (L S K)`` of the least squares for the mix of ``G``'s side, the other's being ``fixed``.

    For ``p``: ``M_kl = tr(G_B[k,l] H)`` with ``H = Σ q_k q_l G_A[k,l]``, ``b_k = Σ_j w_j tr(G_B[k,j] C_j)`` with
    ``C_j = Σ_l q_l G_A[j,l]``. For ``q`` the roles are exchanged, and the traces pair transposed blocks.
    """
    C = torch.einsum("xsl,xklij->xskij", fixed, other)
    H = torch.einsum("xsk,xskij->xsij", fixed, C)
    M = torch.einsum("xklij,xsji->xskl", G, H)
    b = torch.einsum("xkjab,xsjba->xsk", G, w[:, None, None] * C)
    return M, b


def als(grams: Grams, w: Tensor, whole_model: bool, sweeps: int) -> tuple[Tensor, Tensor]:
    """The best ``p`` and ``q`` (``L K``) that several starts lead to, each by at most ``sweeps`` sweeps.

    ``whole_model``: one ``(p, q)`` for all ``L`` weights. Without sweeps, FedIT's ``p = q = w``.
    """
    L, K = len(grams.B), len(w)
    found = sweep_from(grams, w, w.expand(L, 1, K), whole_model, sweeps)
    odd = turned(grams, w)
    odd = odd.any().expand(L) if whole_model else odd
    if sweeps and K > 1 and bool(odd.any()):
        some = Grams(grams.B[odd], grams.A[odd])
        first = Fit(*(x[odd] for x in found))
        best = _best(_joined(first, _other_starts(some, w, whole_model, sweeps)), some, w, whole_model)
        for whole, part in zip(found, best):
            whole[odd] = part
    return found.p[:, 0], found.q[:, 0]


def _other_starts(grams: Grams, w: Tensor, whole_model: bool, sweeps: int) -> Fit:
    """From the mean of the turned factors, principal components, and the clients that are best after a few sweeps."""
    singles = _singles(grams, w, whole_model, min(SINGLES, len(w)))
    tried = sweep_from(grams, w, singles, whole_model, min(TRIAL, sweeps))
    error = tried.error.sum(0, keepdim=True).expand_as(tried.error) if whole_model else tried.error
    chosen = error.argsort(dim=-1, stable=True)[:, :FINALISTS, None].expand(-1, -1, len(w))
    more = _principal(grams, w, whole_model), _rotated(grams, w, whole_model)
    return sweep_from(grams, w, torch.cat([tried.q.gather(1, chosen), *more], dim=1), whole_model, sweeps)


def _singles(grams: Grams, w: Tensor, whole_model: bool, many: int) -> Tensor:
    """One client each, those with the largest share ``w_k ‖B_k A_k‖`` of the target: ``L many K``.

    Clients are not told apart by their weights alone: these are often equal, and the order of clients must not matter.
    """
    share = _shares(grams, w)
    share = share.sum(0, keepdim=True).expand_as(share) if whole_model else share
    return torch.eye(len(w), dtype=w.dtype, device=w.device)[share.argsort(dim=-1, descending=True)[:, :many]]


def _principal(grams: Grams, w: Tensor, whole_model: bool) -> Tensor:
    """The first principal components of the clients, by their products and by either side's factors: ``L S K``."""
    sides = [torch.einsum("xklij,xklij->xkl", *grams), *(torch.einsum("xklii->xkl", side) for side in grams)]
    S = torch.stack(sides, dim=1) * (w[:, None] * w)
    S = S.sum(0, keepdim=True).expand_as(S) if whole_model else S
    first: Tensor = torch.linalg.eigh(S).eigenvectors.mT.flip(-2)[:, :, :PRINCIPAL]
    return w * first.flatten(1, 2)


def _shares(grams: Grams, w: Tensor) -> Tensor:
    """``w_k ‖B_k A_k‖`` for every k: ``L K``."""
    B, A = (torch.diagonal(side, dim1=1, dim2=2).movedim(-1, 1) for side in grams)
    return w * torch.einsum("xkij,xkji->xk", B, A).clamp_min(0).sqrt()


def _rotated(grams: Grams, w: Tensor, whole_model: bool) -> Tensor:
    """The mix nearest to the mean ``Σ w_k T_kᵀ A_k`` of factors that are each rotated towards it: ``L 1 K``."""
    L, K, _, r, _ = grams.A.shape
    T = torch.eye(r, dtype=w.dtype, device=w.device).expand(L, K, r, r)
    both = _both(grams, w)
    for _ in range(3):
        T, _ = polar(einsum("l,xklij,xljm->xkim", w, both, T))
    M = torch.einsum("xklii->xkl", grams.A)[:, None]
    b = einsum("l,xklij,xlij->xk", w, grams.A, T)[:, None]
    return _step(torch.zeros_like(b), M, b, whole_model)[0].expand(L, 1, K)


def _both(grams: Grams, w: Tensor) -> Tensor:
    """The products of both sides, each over its mean ``‖X_k‖²``: a rotation acts on both alike. ``L K K r r``."""
    sizes = [torch.einsum("k,xkkii->x", w, side).clamp_min(1e-300)[:, None, None, None, None] for side in grams]
    return grams.B / sizes[0] + grams.A / sizes[1]


def turned(grams: Grams, w: Tensor) -> Tensor:
    """Where neither side's factors agree, and rotating each towards the client with the largest share of the target
    brings them closer: ``L``. Towards the mean, of which each is a part, noise would come closer, too."""
    apart = ~(agreement(*_norms(grams, w)) >= AGREE)
    if not bool(apart.any()):
        return apart
    both = _both(grams, w)
    T, _ = polar(both[torch.arange(len(both), device=w.device), :, _shares(grams, w).argmax(-1)])
    rotated = torch.einsum("k,xkim,xkim->x", w, T, einsum("l,xklij,xljm->xkim", w, both, T))
    return apart & (rotated > CLOSER * einsum("k,l,xklii->x", w, w, both))


def _norms(grams: Grams, w: Tensor) -> tuple[Tensor, Tensor]:
    """``‖X̄‖²`` and the mean of ``‖X_k‖²``, of both sides: ``2 L``."""
    pairs = torch.stack([torch.einsum("xklii->xkl", side) for side in grams])
    return einsum("k,l,sxkl->sx", w, w, pairs), torch.einsum("k,sxkk->sx", w, pairs)


def agreement(mean: Tensor, each: Tensor) -> Tensor:
    """How far clients share a frame: one where a side's factors are alike, near ``1/K`` where they are all turned."""
    return (mean / each.clamp_min(torch.finfo(each.dtype).tiny)).amax(0)


def _joined(one: Fit, other: Fit) -> Fit:
    p, q, error = (torch.cat(pair, dim=1) for pair in zip(one, other))
    return Fit(p, q, error)


def _best(fit: Fit, grams: Grams, w: Tensor, whole_model: bool) -> Fit:
    """The start with the least error; of equally good ones the first."""
    error = fit.error.sum(0, keepdim=True).expand_as(fit.error) if whole_model else fit.error
    size = error.abs().amax(-1, keepdim=True)
    first = (error <= error.amin(-1, keepdim=True) + 1e-9 * size).double().argmax(-1)[:, None]
    p, q = (x.gather(1, first[..., None].expand(-1, -1, len(w))) for x in fit[:2])
    return Fit(p, q, fit.error.gather(1, first))


def sweep_from(grams: Grams, w: Tensor, starts: Tensor, whole_model: bool, sweeps: int) -> Fit:
    """From ``p = q =`` each start; a half-sweep can only lower the error. Ends where none changes any more."""
    p = q = starts
    target = einsum("k,l,xklij,xklij->x", w, w, grams.B, grams.A)  # ‖W*‖² a weight
    for _ in range(sweeps):
        p, down, _ = _step(p, *normal(grams.B, grams.A, q, w), whole_model)
        q, more, gain = _step(q, *normal(grams.A, grams.B, p, w), whole_model)
        p, q = balanced(p, q)
        size = target[:, None].sum(0, keepdim=True) if whole_model else target[:, None]
        if bool((down + more <= STILL * (size - gain).clamp_min(0) + ROUNDING * size.abs()).all()):
            break
    return Fit(p, q, _error(grams, w, p, q))


def _error(grams: Grams, w: Tensor, p: Tensor, q: Tensor) -> Tensor:
    M, b = normal(grams.B, grams.A, q, w)
    return ((M @ p[..., None])[..., 0] * p - 2 * p * b).sum(-1)


def _step(p: Tensor, M: Tensor, b: Tensor, whole_model: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares solution nearest to ``p`` (where ``M`` is singular, ``p`` stays); by how much the squared error
    falls; and how far it then lies below the target's squared norm."""
    if whole_model:
        M, b = M.sum(0, keepdim=True), b.sum(0, keepdim=True)
    rest = b - (M @ p[: len(M), ..., None])[..., 0]
    moved = (torch.linalg.pinv(M, rtol=CUT, hermitian=True) @ rest[..., None])[..., 0]
    found = p + moved
    return found, (moved * rest).sum(-1), (found[: len(M)] * b).sum(-1)


def balanced(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ``Σ p = Σ q``, where both sums have one sign; so neither side grows unseen."""
    ratio = q.sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
    c = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
    return p * c, q / c


def adam(grams: Grams, w: Tensor, whole_model: bool, sweeps: int) -> tuple[Tensor, Tensor]:
    """The authors' way: 200 AdamW steps at 1e-2 from ones, on the error relative to the target's norm, without decay.

    The target is the sum ``K W*``: from ones, a product of two sums of K clients lies ``K²`` times above the mean, too
    far for 200 steps. The mixes of the mean are those of the sum, each divided by ``√K``.
    """
    L, K = (1 if whole_model else len(grams.B)), len(w)
    p, q = (torch.ones(L, K, dtype=w.dtype, device=w.device, requires_grad=True) for _ in "pq")
    each = w * K
    target = einsum("k,j,...kjab,...kjab->...", each, each, grams.B, grams.A)  # ‖K W*‖² a weight
    scale = torch.where(target > 0, target, torch.ones_like(target))
    optimizer = torch.optim.AdamW([p, q], lr=1e-2, weight_decay=0.0)
    with torch.enable_grad():
        for _ in range(200):
            optimizer.zero_grad()
            M, b = (x[:, 0] for x in normal(grams.B, grams.A, q.expand(len(grams.B), -1)[:, None], each))
            error = einsum("...k,...kl,...l->...", p, M, p) - 2 * (p * b).sum(-1)
            (error.sum() / scale.sum() if whole_model else (error / scale).sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    p, q = (x.detach().expand(len(grams.B), -1) / K**0.5 for x in (p, q))
    return p, q
