"""Norms, inner products, distances, cosines and angles of products against dense algebra."""

import pytest
import torch

from fedlora.linalg import geometry
from fedlora.linalg.geometry import (
    difference,
    distances,
    inner_products,
    joint_cores,
    mean_cosine,
    mean_principal_angle,
    norms,
    spread,
    squared_distances,
    squared_norm,
)
from fedlora.linalg.sums import Term
from fedlora.types import Factors
from tests.fixtures.terms import dense, drawn


def updates(K=5, stack=(), seed=0, shared=None):
    """K products ``(9 × 3)(3 × 7)``; ``shared`` names the side that is one tensor for all."""
    g = torch.Generator().manual_seed(seed)
    U, V = ([torch.randn(*stack, *shape, generator=g).double() for _ in range(K)] for shape in ((9, 3), (3, 7)))
    return [Factors(U[0] if shared == "U" else u, V[0] if shared == "V" else v) for u, v in zip(U, V)]


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
def test_norms(stack):
    terms = drawn(many=stack)
    torch.testing.assert_close(norms(terms), torch.stack([torch.linalg.matrix_norm(t.c * t.U @ t.V) for t in terms]))
    f = updates(1, stack)[0]
    torch.testing.assert_close(squared_norm(f), f.dense().square().sum((-2, -1)))


@pytest.mark.parametrize("shared", [None, "U", "V"])
def test_differences_and_inner_products(shared):
    start, *ends = (Term(0.5, *f) for f in updates(6, shared=shared))
    changes = [difference(end._replace(c=0.5), start) for end in ends]
    D = torch.stack([dense([end]) - dense([start]) for end in ends]).flatten(1)
    torch.testing.assert_close(torch.stack([f.dense() for f in changes]).flatten(1), D)
    assert all(f.V.shape[-2] == (6 if shared is None else 3) for f in changes)
    G = inner_products(changes)
    torch.testing.assert_close(G, D @ D.T)
    torch.testing.assert_close(squared_distances(G), torch.cdist(D, D).square(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("limit", [2048, 0])
def test_distances(limit, monkeypatch):
    monkeypatch.setattr(geometry, "EXACT_RANK", limit)
    terms = drawn(30, 200, 150)
    W, other = dense(terms), [Term(0.9 * t.c, t.U, t.V) for t in terms[:-1]]
    norm, (away, none) = distances(terms, [other, terms])
    close = 1e-9 if limit else 0.1  # random probes estimate
    assert norm == pytest.approx(float(W.norm()), rel=close)
    assert away == pytest.approx(float((W - dense(other)).norm() / W.norm()), rel=close)
    assert none < 1e-12
    assert distances([terms[0]._replace(c=0.0)], [[terms[0]]])[1] == [0.0]


@pytest.mark.parametrize("stack", [(), (4,)])
def test_joint_cores_keep_norms_distances_and_singular_values(stack):
    both = updates(2, stack)
    one, other = joint_cores(both)
    a, b = (f.dense() for f in both)
    torch.testing.assert_close(torch.linalg.matrix_norm(one - other), torch.linalg.matrix_norm(a - b))
    torch.testing.assert_close(torch.linalg.svdvals(one)[..., :3], torch.linalg.svdvals(a)[..., :3])


@pytest.mark.parametrize("shared", [None, "U"])
def test_spread(shared):
    some, w = updates(5, (2,), shared=shared), [0.1, 0.2, 0.3, 0.25, 0.15]
    D = torch.stack([f.dense() for f in some])
    mean = sum(x * d for x, d in zip(w, D))
    exact = sum(x * (d - mean).square().sum((-2, -1)) for x, d in zip(w, D)).sqrt()
    torch.testing.assert_close(spread(some, w, torch.linalg.matrix_norm(mean)), exact)


def test_mean_cosine_is_over_all_pairs():
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    x[3, 2] = 0  # its cosine with any other is 0
    found = mean_cosine(list(x))
    for part in range(3):
        flat = x[:, part].flatten(1)
        pairs = [torch.cosine_similarity(flat[i], flat[j], dim=0) for i in range(4) for j in range(i)]
        assert float(found[part]) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-9)


def test_mean_principal_angle():
    half_turn = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double().T, torch.tensor([[1.0, 0, 0], [0, 0, 1]]).double().T
    assert mean_principal_angle(torch.stack(half_turn)) == pytest.approx(torch.pi / 4)  # angles 0 and π/2
