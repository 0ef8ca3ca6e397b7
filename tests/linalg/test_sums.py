"""Sums of products against dense algebra: passes, the randomized SVD, and sequences that hold nothing."""

import pytest
import torch

from fedlora.linalg import sums
from fedlora.linalg.sums import (
    Lazy,
    Term,
    apply,
    apply_transpose,
    exact_svd,
    orthonormalize,
    randomized_svd,
    regroup,
    stack,
    truncated_svd,
    widen,
)
from tests.fixtures.terms import dense, drawn


@pytest.mark.parametrize("many", [(), (2,), (2, 3)])
def test_passes_and_stacks(many, monkeypatch):
    terms = drawn(many=many)
    W = dense(terms)
    X, Y = torch.randn(*many, 33, 4).double(), torch.randn(*many, 40, 4).double()
    torch.testing.assert_close(stack(terms).dense(), W)
    torch.testing.assert_close(apply(terms, X), W @ X)
    torch.testing.assert_close(apply_transpose(terms, Y), W.mT @ Y)
    monkeypatch.setattr(sums, "WIDE", 7)
    assert [t.V.shape[-2] for t in widen(terms)] == [9, 9, 3]
    torch.testing.assert_close(dense(list(widen(terms))), W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_range_finder_is_nearly_the_best_and_never_worse_than_fedit(spread, warm, dtype):
    for seed in range(4):
        terms = drawn(20, spread=spread, seed=seed, dtype=dtype)
        w = [t.c for t in terms]
        A = sum(c * t.V for c, t in zip(w, terms)) / sum(w)
        B = sum(c * t.U for c, t in zip(w, terms))
        W = dense(terms).double()
        found = (randomized_svd(terms, 3, A.mT if warm else None).factors().dense().double() - W).norm()
        least = torch.linalg.svdvals(W)[3:].norm()
        assert least <= found * (1 + 1e-5) and found <= least * (1.02 if spread == 1 else 1.001)
        if warm:
            assert found <= (B.double() @ A.double() - W).norm() * (1 + 1e-5)


def test_factors_of_the_range_finder_are_orthonormal_and_in_order():
    P, S, Q = randomized_svd(drawn(20), 3)
    for X in (P, Q):
        torch.testing.assert_close(X.mT @ X, torch.eye(3).double(), atol=1e-7, rtol=0)
    assert (S[:-1] >= S[1:]).all()
    torch.testing.assert_close(S, torch.linalg.svdvals(dense(drawn(20)))[:3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_sums_of_less_than_their_rank(rank):
    """Nothing learnt, or little: no direction may come out as infinite or not a number."""
    terms = [t._replace(U=torch.cat([t.U[:, :rank], 0 * t.U[:, rank:]], -1), V=drawn()[0].V) for t in drawn(30)]
    for dtype in (torch.float32, torch.float64):
        cast = [t._replace(U=t.U.to(dtype), V=t.V.to(dtype)) for t in terms]
        f = randomized_svd(cast, 3, cast[0].V.mT).factors()
        assert f.U.isfinite().all() and f.V.isfinite().all()
        torch.testing.assert_close(f.dense().double(), dense(terms), rtol=1e-4, atol=1e-4)


def test_orthonormal_columns_and_zeros():
    Y = torch.randn(30, 4).double()
    Y[:, 3] = Y[:, 0] + Y[:, 1]
    Q = orthonormalize(Y)
    torch.testing.assert_close(Q @ Q.mT @ Y, Y)
    assert sorted(Q.norm(dim=0).round(decimals=6).tolist()) == [0, 1, 1, 1]


def test_small_stacks_are_exact_and_large_ones_are_not_stacked(monkeypatch):
    terms = drawn(20)
    torch.testing.assert_close(truncated_svd(terms, 3).factors().dense(), exact_svd(stack(terms), 3).factors().dense())
    monkeypatch.setattr(sums, "EXACT_FLOPS", 0)
    asked = []
    monkeypatch.setattr(sums, "randomized_svd", lambda *a: asked.append(a) or exact_svd(stack(a[0]), a[1]))
    truncated_svd(terms, 3)
    assert asked


def test_nothing_is_held_of_a_sum_that_is_too_large(monkeypatch):
    made = []
    terms = drawn()
    lazy = Lazy(len(terms), lambda k: made.append(k) or terms[k])
    monkeypatch.setattr(sums, "CACHE_LIMIT", 0)
    wide = regroup(lazy)
    for _ in range(2):
        torch.testing.assert_close(dense(list(wide)), dense(terms))
    assert made.count(3) >= 2, "made anew in every pass"
    with pytest.raises(IndexError):
        lazy[7]


@pytest.mark.parametrize("rank", [3, 9])
def test_a_start_that_has_cancelled_or_is_too_narrow(rank):
    """Clients (A, B) and (-A, -B): the mean of A is nothing, the mean product is not."""
    terms = [Term(1.0, s * t.U, s * t.V) for t in drawn(6) for s in (1, -1)]
    W = dense(terms)
    for start in (sum(t.V for t in terms).mT, drawn()[0].V.mT):
        found = (randomized_svd(terms, rank, start).factors().dense() - W).norm()
        assert found <= torch.linalg.svdvals(W)[rank:].norm() * 1.001
