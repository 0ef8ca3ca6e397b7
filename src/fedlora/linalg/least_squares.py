"""The best mixes of given factors: ``min_{p,q} ‖Σ w_k B_k A_k − (Σ p_k B_k)(Σ q_k A_k)‖_F``, from Gram matrices.

Alternating least squares, until a sweep changes nothing. All pairwise products are computed once, in float64, and the
sweeps need nothing else. ``matrix_free`` solves the same problem for many clients.

If clients hold their factors in rotated frames (``B_k R_k`` and ``R_kᵀ A_k`` for rotations ``R_k``), means cancel, the
problem has many local optima, and sweeps from FedIT's weights end far from the best mix. So if neither side's factors
agree, and rotating them makes them agree better, the sweeps also start from single clients, from principal components,
and from the mean of the factors after each is rotated towards it; the mix with the least error is used. If one side
agrees, or the factors differ by noise that no rotation removes, sweeps from FedIT's weights are enough.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.factors import einsum, polar

CUT = 1e-12  # relative: below it a direction of the normal matrix is rounding error
STILL = 1e-6  # relative: a sweep that lowers the squared error by less is the last one
ROUNDING = 1e-20  # of the squared norm of the target: a smaller decrease is rounding error
AGREE = 0.8  # agreement (‖X̄‖² over the mean of ‖X_k‖²) on either side above which the clients share a frame
CLOSER = 1.05  # factor by which rotating must raise the agreement; else the factors differ by more than their frames
SINGLES, FINALISTS, TRIAL = 32, 8, 5  # clients to start from, the best of them, and the sweeps that select these
PRINCIPAL = 4  # principal components to start from, of each of three kinds


class ClientFactors(NamedTuple):
    """The factors to mix, and the weights of the target ``Σ w_k B_k A_k``."""

    A: Float[Tensor, "*stack K r n"]
    B: Float[Tensor, "*stack K m r"]
    w: Float[Tensor, "K"]


class Grams(NamedTuple):
    """``B[k, l] = B_kᵀ B_l`` and ``A[k, l] = A_k A_lᵀ``, in float64, since the error is a small difference of them."""

    B: Float[Tensor, "*stack K K r r"]
    A: Float[Tensor, "*stack K K r r"]


class Fit(NamedTuple):
    """Mixes of ``L`` weights from ``S`` starts, and their squared errors minus the target's squared norm."""

    p: Float[Tensor, "L S K"]
    q: Float[Tensor, "L S K"]
    error: Float[Tensor, "L S"]


def gram_matrices(factors: ClientFactors) -> Grams:
    """All pairwise products, by one matrix product a side in the factors' precision.

    It multiplies the mean and the deviations from it, and adds up in float64, so rounding is as small as either.
    """
    return Grams(_pairs(factors.B.mT, factors.w), _pairs(factors.A, factors.w))


def _pairs(X: Tensor, w: Tensor) -> Tensor:
    """``X_k X_lᵀ`` of all pairs of ``X (K r n)``, float64."""
    *stack, K, r, n = X.shape
    mean = torch.einsum("k,...krn->...rn", w.to(X.dtype), X)[..., None, :, :]
    long = torch.cat([mean, X - mean], dim=-3).reshape(*stack, (K + 1) * r, n)
    S = (long @ long.mT).double().reshape(*stack, K + 1, r, K + 1, r).transpose(-3, -2)
    return S[..., :1, :1, :, :] + S[..., :1, 1:, :, :] + S[..., 1:, :1, :, :] + S[..., 1:, 1:, :, :]


def normal_equations(G: Tensor, other: Tensor, fixed: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``M (L S K K)`` and ``b (L S K)`` of the normal equations for the mix of ``G``'s side, with the other ``fixed``.

    For ``p``: ``M_kl = tr(G_B[k,l] H)`` with ``H = Σ q_k q_l G_A[k,l]``, ``b_k = Σ_j w_j tr(G_B[k,j] C_j)`` with
    ``C_j = Σ_l q_l G_A[j,l]``. For ``q`` the roles are exchanged, and the traces pair transposed blocks.
    """
    C = torch.einsum("xsl,xklij->xskij", fixed, other)
    H = torch.einsum("xsk,xskij->xsij", fixed, C)
    M = torch.einsum("xklij,xsji->xskl", G, H)
    b = torch.einsum("xkjab,xsjba->xsk", G, w[:, None, None] * C)
    return M, b


def als(grams: Grams, w: Tensor, whole_model: bool, sweeps: int) -> tuple[Tensor, Tensor]:
    """The best ``p`` and ``q`` (``L K``) of several starts, by at most ``sweeps`` sweeps from each.

    ``whole_model``: one ``(p, q)`` for all ``L`` weights. Zero sweeps give FedIT's ``p = q = w``.
    """
    L, K = len(grams.B), len(w)
    fit = sweep_from(grams, w, w.expand(L, 1, K), whole_model, sweeps)
    rotated = is_rotated(grams, w)
    rotated = rotated.any().expand(L) if whole_model else rotated
    if sweeps and K > 1 and bool(rotated.any()):
        subset = Grams(grams.B[rotated], grams.A[rotated])
        first, more = Fit(*(x[rotated] for x in fit)), _other_starts(subset, w, whole_model, sweeps)
        fits = Fit(*(torch.cat(pair, dim=1) for pair in zip(first, more)))
        for whole, part in zip(fit, _best(fits, w, whole_model)):
            whole[rotated] = part
    return fit.p[:, 0], fit.q[:, 0]


def _other_starts(grams: Grams, w: Tensor, whole_model: bool, sweeps: int) -> Fit:
    """Fit from the mean of rotated factors, principal components, and the clients that are best after a few sweeps."""
    singles = _single_starts(grams, w, whole_model, min(SINGLES, len(w)))
    tried = sweep_from(grams, w, singles, whole_model, min(TRIAL, sweeps))
    error = tried.error.sum(0, keepdim=True).expand_as(tried.error) if whole_model else tried.error
    chosen = error.argsort(dim=-1, stable=True)[:, :FINALISTS, None].expand(-1, -1, len(w))
    more = _principal_starts(grams, w, whole_model), _rotation_starts(grams, w, whole_model)
    return sweep_from(grams, w, torch.cat([tried.q.gather(1, chosen), *more], dim=1), whole_model, sweeps)


def _single_starts(grams: Grams, w: Tensor, whole_model: bool, many: int) -> Tensor:
    """Single clients with the largest share ``w_k ‖B_k A_k‖`` of the target: ``L many K``.

    Weights alone do not rank clients: they are often equal, and the order of clients must not matter.
    """
    share = _shares(grams, w)
    share = share.sum(0, keepdim=True).expand_as(share) if whole_model else share
    return torch.eye(len(w), dtype=w.dtype, device=w.device)[share.argsort(dim=-1, descending=True)[:, :many]]


def _principal_starts(grams: Grams, w: Tensor, whole_model: bool) -> Tensor:
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


def _rotation_starts(grams: Grams, w: Tensor, whole_model: bool) -> Tensor:
    """The mix nearest to the mean ``Σ w_k T_kᵀ A_k`` of factors after each is rotated towards it: ``L 1 K``."""
    L, K, _, r, _ = grams.A.shape
    T = torch.eye(r, dtype=w.dtype, device=w.device).expand(L, K, r, r)
    both = _both(grams, w)
    for _ in range(3):
        T, _ = polar(einsum("l,xklij,xljm->xkim", w, both, T))
    M = torch.einsum("xklii->xkl", grams.A)[:, None]
    b = einsum("l,xklij,xlij->xk", w, grams.A, T)[:, None]
    return _step(torch.zeros_like(b), M, b, whole_model)[0].expand(L, 1, K)


def _both(grams: Grams, w: Tensor) -> Tensor:
    """The Gram matrices of both sides, each divided by its mean ``‖X_k‖²``, added up: ``L K K r r``.

    A rotation acts on both sides alike.
    """
    sizes = [torch.einsum("k,xkkii->x", w, side).clamp_min(1e-300)[:, None, None, None, None] for side in grams]
    return grams.B / sizes[0] + grams.A / sizes[1]


def is_rotated(grams: Grams, w: Tensor) -> Tensor:
    """Whether the clients' frames are rotated against each other, for each weight: ``L``.

    They are if neither side's factors agree, and rotating each towards the client with the largest share of the target
    brings them closer. Each client is a part of the mean, so rotating towards the mean would bring noise closer, too.
    """
    pairs = torch.stack([torch.einsum("xklii->xkl", side) for side in grams])
    # ‖X̄‖² and the mean of ‖X_k‖² of both sides.
    norms, mean_norms = einsum("k,l,sxkl->sx", w, w, pairs), torch.einsum("k,sxkk->sx", w, pairs)
    apart = ~(agreement(norms, mean_norms) >= AGREE)
    if not bool(apart.any()):
        return apart
    both = _both(grams, w)
    T, _ = polar(both[torch.arange(len(both), device=w.device), :, _shares(grams, w).argmax(-1)])
    rotated = torch.einsum("k,xkim,xkim->x", w, T, einsum("l,xklij,xljm->xkim", w, both, T))
    return apart & (rotated > CLOSER * einsum("k,l,xklii->x", w, w, both))


def agreement(mean: Tensor, each: Tensor) -> Tensor:
    """Agreement of the clients' frames: 1 if a side's factors are equal, near ``1/K`` if all frames are rotated."""
    return (mean / each.clamp_min(torch.finfo(each.dtype).tiny)).amax(0)


def _best(fit: Fit, w: Tensor, whole_model: bool) -> Fit:
    """Select the start with the least error; of equally good ones the first."""
    error = fit.error.sum(0, keepdim=True).expand_as(fit.error) if whole_model else fit.error
    size = error.abs().amax(-1, keepdim=True)
    first = (error <= error.amin(-1, keepdim=True) + 1e-9 * size).double().argmax(-1)[:, None]
    p, q = (x.gather(1, first[..., None].expand(-1, -1, len(w))) for x in fit[:2])
    return Fit(p, q, fit.error.gather(1, first))


def sweep_from(grams: Grams, w: Tensor, starts: Tensor, whole_model: bool, sweeps: int) -> Fit:
    """Sweep from ``p = q =`` each start until the error stops falling. A half-sweep can only lower it."""
    p = q = starts
    target = einsum("k,l,xklij,xklij->x", w, w, grams.B, grams.A)  # ‖W*‖² a weight
    for _ in range(sweeps):
        p, down, _ = _step(p, *normal_equations(grams.B, grams.A, q, w), whole_model)
        q, more, gain = _step(q, *normal_equations(grams.A, grams.B, p, w), whole_model)
        p, q = equalize_sums(p, q)
        size = target[:, None].sum(0, keepdim=True) if whole_model else target[:, None]
        if bool((down + more <= STILL * (size - gain).clamp_min(0) + ROUNDING * size.abs()).all()):
            break
    M, b = normal_equations(grams.B, grams.A, q, w)
    return Fit(p, q, ((M @ p[..., None])[..., 0] * p - 2 * p * b).sum(-1))


def _step(p: Tensor, M: Tensor, b: Tensor, whole_model: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One least-squares solve: the solution nearest to ``p``, the decrease of the squared error, and the amount by
    which the error is then below the target's squared norm. In singular directions of ``M``, ``p`` stays the same."""
    if whole_model:
        M, b = M.sum(0, keepdim=True), b.sum(0, keepdim=True)
    rest = b - (M @ p[: len(M), ..., None])[..., 0]
    step = (torch.linalg.pinv(M, rtol=CUT, hermitian=True) @ rest[..., None])[..., 0]
    solution = p + step
    return solution, (step * rest).sum(-1), (solution[: len(M)] * b).sum(-1)


def equalize_sums(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale to ``Σ p = Σ q`` if both sums have the same sign, so that neither side grows without bound."""
    ratio = q.sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
    c = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
    return p * c, q / c


def adam(grams: Grams, w: Tensor, whole_model: bool, sweeps: int) -> tuple[Tensor, Tensor]:
    """The authors' solver: 200 AdamW steps at 1e-2 from ones, on the error relative to the target's norm, no decay.

    The target is the sum ``K W*``, since at ones the product of two sums of K clients is ``K²`` times the mean, too far
    for 200 steps. The mixes of the mean are those of the sum, each divided by ``√K``.
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
            M, b = (x[:, 0] for x in normal_equations(grams.B, grams.A, q.expand(len(grams.B), -1)[:, None], each))
            error = einsum("...k,...kl,...l->...", p, M, p) - 2 * (p * b).sum(-1)
            (error.sum() / scale.sum() if whole_model else (error / scale).sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    p, q = (x.detach().expand(len(grams.B), -1) / K**0.5 for x in (p, q))
    return p, q
