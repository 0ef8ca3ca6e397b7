"""Gram space and passes: two ways to one answer, in float64 and in float32, for few clients and for many."""

import pytest
import torch

from fedlora import mixing
from fedlora.mixing import Atoms, als, best_mixes, gram, passes, streamed


def drawn(seed, K, m, n, r, spread, dtype=torch.float64, stack=(2,)):
    g = torch.Generator().manual_seed(seed)
    A0, B0 = (torch.randn(*stack, 1, *s, generator=g, dtype=torch.float64) for s in ((r, n), (m, r)))
    A = A0 + spread * torch.randn(*stack, K, r, n, generator=g, dtype=torch.float64)
    B = B0 + spread * torch.randn(*stack, K, m, r, generator=g, dtype=torch.float64)
    w = torch.rand(K, generator=g, dtype=torch.float64)
    return Atoms(A.to(dtype), B.to(dtype), w / w.sum())


def error(atoms, p, q):
    A, B = atoms.A.double(), atoms.B.double()
    exact = torch.einsum("k,skmr,skrn->smn", atoms.w, B, A)
    away = torch.einsum("sk,skmr->smr", p, B) @ torch.einsum("sk,skrn->srn", q, A) - exact
    return away.norm() / exact.norm()


@pytest.mark.parametrize("spread", [2.0, 0.3, 1e-3])
@pytest.mark.parametrize("K", [1, 2, 7, 40])
def test_both_ways_give_the_same_mixes(K, spread):
    atoms = drawn(K, K, 23, 17, 3, spread)
    p, q = als(gram(atoms), atoms.w, False, 30)
    own_p, own_q = passes(atoms, 30)
    torch.testing.assert_close(error(atoms, own_p, own_q), error(atoms, p, q), rtol=1e-6, atol=1e-12)
    if K < 7 or spread > 1:  # else directions of p have no influence to speak of
        torch.testing.assert_close(own_p, p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("K", [5, 40])
def test_float32_factors_are_fitted_as_well(K, spread):
    """What is gained over FedIT is a small part of a small difference: sums that cancel would lose it."""
    atoms = drawn(3, K, 60, 50, 4, spread, torch.float32)
    start = atoms.w.expand(2, -1)
    best = error(atoms, *als(gram(atoms), atoms.w, False, 30))
    found = error(atoms, *passes(atoms, 30))
    rounding = 2e-7  # of the factors themselves
    assert found <= error(atoms, start, start) + rounding
    assert float(found) == pytest.approx(float(best), rel=1e-4, abs=rounding)


def test_clients_that_repeat_each_other():
    """Singular systems: the mixes stay finite, and the answer as good."""
    atoms = drawn(0, 5, 20, 16, 2, 0.5)
    twice = Atoms(*(torch.cat([x, x], dim=-3) for x in atoms[:2]), torch.cat([atoms.w, atoms.w]) / 2)
    one, two = (error(a, *passes(a, 20)) for a in (atoms, twice))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


def test_zero_factors():
    atoms = drawn(0, 4, 9, 8, 2, 0.5)
    p, q = passes(atoms._replace(B=torch.zeros_like(atoms.B)), 5)
    assert p.isfinite().all() and q.isfinite().all()


@pytest.mark.parametrize(("K", "way"), [(10, "gram"), (100, "passes")])
def test_the_cheaper_way_is_taken(K, way, monkeypatch):
    taken = []
    for name in ("gram", "passes"):
        real = getattr(mixing, name)
        monkeypatch.setattr(mixing, name, lambda *a, real=real, name=name: taken.append(name) or real(*a))
    best_mixes(drawn(0, K, 40, 40, 16, 0.5, stack=(1,)), 10)
    assert taken == [way]


@pytest.mark.parametrize("K", [3, 40])
def test_streamed_factors_give_the_same_mixes(K):
    atoms = drawn(1, K, 23, 17, 3, 0.5)
    asked = []

    class Watched(list):
        def __getitem__(self, k):
            asked.append(k)
            return super().__getitem__(k)

    A, B = (Watched(x.unbind(-3)) for x in (atoms.A, atoms.B))
    one, two = passes(atoms, 10), streamed(A, B, atoms.w, 10)
    torch.testing.assert_close(error(atoms, *one), error(atoms, *two), rtol=1e-6, atol=0)
    torch.testing.assert_close(one[0], two[0], rtol=1e-2, atol=1e-5)
    assert len(asked) > 10 * K, "several passes, and nothing kept"
