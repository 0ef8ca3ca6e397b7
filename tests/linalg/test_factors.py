"""Low-rank algebra against dense algebra, with leading dimensions."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.linalg.factors import core, einsum, polar, procrustes, scale, total, truncate
from fedlora.types import Factors

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))


def drawn(m, n, r, seed, stack=(2,)):
    g = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(*stack, m, r, generator=g, dtype=torch.float64),
        torch.randn(*stack, r, n, generator=g, dtype=torch.float64),
    )


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_total_scale_and_core(size):
    m, n, r, K, seed = size
    parts = [drawn(m, n, r, seed + k) for k in range(K)]
    parts = [*parts, Factors(parts[0].U + 1, parts[0].V), Factors(parts[0].U, parts[0].V - 1)]  # shared sides
    dense = sum(p.dense() for p in parts)
    torch.testing.assert_close(total(parts).dense(), dense)
    torch.testing.assert_close(scale(total(parts), -0.3).dense(), -0.3 * dense)
    Qu, C, Qv = core(total(parts))
    torch.testing.assert_close(torch.linalg.matrix_norm(C), torch.linalg.matrix_norm(dense))
    torch.testing.assert_close(Qu @ C @ Qv.mT, dense)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_truncate_gives_the_best_of_its_rank(size):
    m, n, r, k, seed = size
    f = drawn(m, n, r, seed)
    found = truncate(f, k)
    tail = torch.linalg.svdvals(f.dense())[..., k:].norm(dim=-1)
    torch.testing.assert_close(torch.linalg.matrix_norm(found.dense() - f.dense()), tail, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.U.norm(dim=-2), found.V.norm(dim=-1))  # √S on both sides


def test_shared_sides_do_not_widen_the_stack():
    V = torch.randn(3, 7)
    assert total([Factors(torch.randn(5, 3), V) for _ in range(10)]).U.shape == (5, 3)
    U = torch.randn(5, 3)
    assert total([Factors(U, torch.randn(3, 7)) for _ in range(10)]).V.shape == (3, 7)


def test_procrustes_and_polar():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(50, 4, 4, generator=g, dtype=torch.float64)
    R, S = procrustes(M)
    torch.testing.assert_close(S, torch.linalg.svdvals(M))
    torch.testing.assert_close(R @ R.mT, torch.eye(4, dtype=torch.float64).expand(50, 4, 4))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(50, dtype=torch.float64))
    Q = torch.linalg.qr(torch.randn(200, 1, 4, 4, generator=g, dtype=torch.float64))[0]
    Q = torch.cat([Q[..., :1] * torch.linalg.det(Q)[..., None, None], Q[..., 1:]], dim=-1)  # det 1
    assert (torch.einsum("bij,bij->b", R, M) >= torch.einsum("kbij,bij->kb", Q.expand(-1, 50, -1, -1), M) - 1e-9).all()
    torch.testing.assert_close(polar(R)[0], R)
    torch.testing.assert_close(polar(torch.eye(3))[0], torch.eye(3), rtol=0, atol=0)


def test_annotated_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="procrustes"):
        procrustes(torch.randn(3, 4))  # annotated r x r


def test_three_operands_have_the_same_bits_whatever_else_is_installed():
    draws = torch.Generator().manual_seed(0)
    w, G, C = (
        torch.rand(shape, generator=draws, dtype=torch.float64) for shape in ((5,), (3, 5, 5, 7, 7), (3, 5, 7, 7))
    )
    found = einsum("j,...kjab,...jba->...k", w, G, C)
    # From left to right: first the weights into the blocks, then the traces.
    assert torch.equal(found, torch.einsum("...kjab,...jba->...k", torch.einsum("j,...kjab->...kjab", w, G), C))
