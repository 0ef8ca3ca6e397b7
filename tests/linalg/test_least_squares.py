"""Gram matrices and passes: two ways to one answer, in float64 and in float32, for few clients and for many."""

import pytest
import torch
from safetensors.torch import load_file

from fedlora.linalg import least_squares, matrix_free
from fedlora.linalg.least_squares import ClientFactors, Grams, als, gram_matrices
from fedlora.linalg.matrix_free import solve_in_memory, solve_mixes, solve_streaming


def drawn(seed, K, m, n, r, spread, dtype=torch.float64, stack=(2,)):
    g = torch.Generator().manual_seed(seed)
    A0, B0 = (torch.randn(*stack, 1, *s, generator=g, dtype=torch.float64) for s in ((r, n), (m, r)))
    A = A0 + spread * torch.randn(*stack, K, r, n, generator=g, dtype=torch.float64)
    B = B0 + spread * torch.randn(*stack, K, m, r, generator=g, dtype=torch.float64)
    w = torch.rand(K, generator=g, dtype=torch.float64)
    return ClientFactors(A.to(dtype), B.to(dtype), w / w.sum())


def error(atoms, p, q):
    A, B = atoms.A.double(), atoms.B.double()
    exact = torch.einsum("k,skmr,skrn->smn", atoms.w, B, A)
    away = torch.einsum("sk,skmr->smr", p, B) @ torch.einsum("sk,skrn->srn", q, A) - exact
    return away.norm() / exact.norm()


@pytest.mark.parametrize("spread", [2.0, 0.3, 1e-3])
@pytest.mark.parametrize("K", [1, 2, 7, 40])
def test_both_ways_give_the_same_mixes(K, spread, monkeypatch):
    monkeypatch.setattr(least_squares, "STILL", 0.0)  # where they stop, errors are equal, and mixes to the root of that
    monkeypatch.setattr(matrix_free, "GAINED", 0.0)
    atoms = drawn(K, K, 23, 17, 3, spread)
    p, q = als(gram_matrices(atoms), atoms.w, False, 30)
    own_p, own_q = solve_in_memory(atoms, 30)
    torch.testing.assert_close(error(atoms, own_p, own_q), error(atoms, p, q), rtol=1e-6, atol=1e-12)
    if K < 7 or spread > 1:  # else directions of p have no influence to speak of
        torch.testing.assert_close(own_p, p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("K", [5, 40])
def test_float32_factors_are_fitted_as_well(K, spread):
    """What is gained over FedIT is a small part of a small difference: sums that cancel would lose it."""
    atoms = drawn(3, K, 60, 50, 4, spread, torch.float32)
    start = atoms.w.expand(2, -1)
    best = error(atoms, *als(gram_matrices(atoms), atoms.w, False, 30))
    found = error(atoms, *solve_in_memory(atoms, 30))
    rounding = 2e-7  # of the factors themselves
    assert found <= error(atoms, start, start) + rounding
    assert float(found) == pytest.approx(float(best), rel=1e-4, abs=rounding)


def test_clients_that_repeat_each_other():
    """Singular systems: the mixes stay finite, and the answer as good."""
    atoms = drawn(0, 5, 20, 16, 2, 0.5)
    twice = ClientFactors(*(torch.cat([x, x], dim=-3) for x in atoms[:2]), torch.cat([atoms.w, atoms.w]) / 2)
    one, two = (error(a, *solve_in_memory(a, 20)) for a in (atoms, twice))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_factors(dtype, spread):
    atoms = drawn(0, 4, 9, 8, 2, spread, dtype)
    atoms = atoms._replace(B=torch.zeros_like(atoms.B))
    for p, q in (solve_in_memory(atoms, 5), solve_mixes(atoms, 5)):
        assert p.isfinite().all() and q.isfinite().all()


@pytest.mark.parametrize(("K", "way"), [(10, "gram"), (100, "passes")])
def test_the_cheaper_way_is_taken(K, way, monkeypatch):
    taken = []
    for name, function in (("gram", "gram_matrices"), ("passes", "_alternate")):
        real = getattr(matrix_free, function)
        monkeypatch.setattr(matrix_free, function, lambda *a, real=real, name=name: taken.append(name) or real(*a))
    solve_mixes(drawn(0, K, 40, 40, 16, 0.3, stack=(1,)), 10)
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
    one, two = solve_in_memory(atoms, 10), solve_streaming(A, B, atoms.w, 10)
    torch.testing.assert_close(error(atoms, *one), error(atoms, *two), rtol=1e-6, atol=0)
    torch.testing.assert_close(one[0], two[0], rtol=1e-2, atol=1e-5)
    assert len(asked) > 10 * K, "several passes, and nothing kept"


def turned(seed, K, r, m, n, spread, angle=None, dtype=torch.float64):
    """Clients that nearly agree on the product, and hold it in frames of their own: ``B_k R_k`` and ``R_kᵀ A_k``."""
    g = torch.Generator().manual_seed(seed)
    A0, B0 = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, n), (m, r)))
    A, B = [], []
    for _ in range(K):
        X = torch.randn(r, r, generator=g, dtype=torch.float64)
        R = torch.linalg.qr(X).Q if angle is None else torch.matrix_exp(angle * (X - X.T))
        A.append(R.T @ (A0 + spread * torch.randn(r, n, generator=g, dtype=torch.float64)))
        B.append((B0 + spread * torch.randn(m, r, generator=g, dtype=torch.float64)) @ R)
    w = torch.rand(K, generator=g, dtype=torch.float64) + 0.1
    return ClientFactors(torch.stack(A)[None].to(dtype), torch.stack(B)[None].to(dtype), w / w.sum())


def dense_least(atoms, starts, sweeps=150):
    """The least error over many starts, by normal equations of all ``K²`` written-out products."""
    B, A, w = atoms.B[0].double(), atoms.A[0].double(), atoms.w
    K, g = len(w), torch.Generator().manual_seed(7)
    products = torch.einsum("kmr,lrn->klmn", B, A).reshape(K, K, -1)
    target = torch.einsum("k,kkx->x", w, products)
    X, y = torch.einsum("ijx,klx->ijkl", products, products), products @ target
    random = torch.randn(max(1, starts - K - 1), K, generator=g, dtype=torch.float64)
    q = torch.cat([w[None], torch.eye(K, dtype=torch.float64), random])

    def solved(M, b):
        ridge = 1e-12 * M.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(K, dtype=torch.float64)
        return torch.linalg.solve(M + ridge, b[..., None])[..., 0]

    for _ in range(sweeps):
        p = solved(torch.einsum("ijkl,sj,sl->sik", X, q, q), q @ y.T)
        q = solved(torch.einsum("ijkl,si,sk->sjl", X, p, p), p @ y)
    found = [torch.einsum("k,l,klx->x", *mix, products) - target for mix in zip(p, q)]
    return min(float(x.norm() / target.norm()) for x in found)


@pytest.mark.parametrize(
    ("K", "r", "m", "n", "spread", "angle", "seed"),
    [
        *[(3, 2, 9, 7, 0.2, None, seed) for seed in range(2)],
        *[(4, 3, 11, 8, 0.3, 0.4, seed) for seed in range(2)],
        *[(10, 4, 20, 16, 0.1, None, seed) for seed in (0, 1, 105)],  # 105: the four best clients do not lead there
        *[(10, 4, 20, 16, 0.5, 0.6, seed) for seed in range(2)],
        (30, 8, 24, 20, 0.03, None, 0),  # one draw: the oracle takes seconds
    ],
)
def test_turned_frames_are_mixed_as_well_as_many_starts_find(K, r, m, n, spread, angle, seed):
    atoms = turned(seed, K, r, m, n, spread, angle)
    found = float(error(atoms, *solve_mixes(atoms, 300)))
    assert found <= dense_least(atoms, 24, 150 if K <= 10 else 40) + 0.005


def test_passes_find_the_mixes_of_turned_frames_too():
    atoms = turned(2, 6, 3, 14, 12, 0.5, 0.6)
    best = float(error(atoms, *als(gram_matrices(atoms), atoms.w, False, 300)))
    assert float(error(atoms, *solve_in_memory(atoms, 300))) <= best + 0.005
    assert (
        float(error(atoms, *solve_streaming(list(atoms.A.unbind(-3)), list(atoms.B.unbind(-3)), atoms.w, 300)))
        <= best + 0.005
    )


def test_one_mix_for_weights_of_turned_frames():
    """The sum over weights is what is least; a start that suits one weight alone does not win."""
    one, two = turned(0, 6, 3, 14, 12, 0.1), turned(1, 6, 3, 14, 12, 0.1)
    both = Grams(*(torch.cat(sides) for sides in zip(gram_matrices(one), gram_matrices(two._replace(w=one.w)))))
    p, q = als(both, one.w, True, 300)
    torch.testing.assert_close(p[0], p[1])
    M, b = least_squares.normal_equations(both.B, both.A, q[:, None], one.w)  # of the squared error, for this q
    joint = ((M @ p[:, None, :, None])[..., 0] * p[:, None] - 2 * p[:, None] * b).sum()
    for k in range(6):
        start = torch.eye(6, dtype=torch.float64)[k].expand(2, 1, 6)
        assert joint <= least_squares.sweep_from(both, one.w, start, True, 300).error.sum() + 1e-3 * joint.abs()


def test_the_order_of_turned_clients_with_equal_weights_does_not_matter():
    atoms = turned(3, 7, 3, 14, 12, 0.3)._replace(w=torch.full((7,), 1 / 7, dtype=torch.float64))
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    other = ClientFactors(atoms.A[:, order], atoms.B[:, order], atoms.w)
    torch.testing.assert_close(solve_mixes(atoms, 300)[0][:, order], solve_mixes(other, 300)[0], rtol=1e-5, atol=1e-7)


def test_weights_that_share_a_frame_are_left_alone_by_turned_neighbours():
    plain, odd = drawn(4, 6, 14, 12, 3, 0.1, stack=(1,)), turned(4, 6, 3, 14, 12, 0.1)
    together = ClientFactors(torch.cat([plain.A, odd.A]), torch.cat([plain.B, odd.B]), plain.w)
    alone = solve_mixes(plain, 300)
    torch.testing.assert_close(solve_mixes(together, 300)[0][:1], alone[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", range(15))
def test_recorded_uploads_are_mixed_as_well_as_another_optimiser_does(case, shared):
    """L-BFGS on the dense error, from 24 starts."""
    x = {k[3:]: v for k, v in load_file(shared / "conformance/flora_na.safetensors").items() if k[:2] == f"{case:02}"}
    atoms = ClientFactors(x["A"][None], x["B"][None], x["w"])
    assert float(error(atoms, *solve_mixes(atoms, 300))) <= float(x["best_error"]) + 0.005


def sides(atoms):
    return matrix_free._InMemory(atoms.B, atoms.w), matrix_free._InMemory(atoms.A.mT, atoms.w)


def cancelling(seed, K, r, m, n):
    """Frames whose mean is zero: each client has a twin that holds ``-A`` and ``-B``, all with one weight."""
    atoms = drawn(seed, K // 2, m, n, r, 0.05, stack=(1,))
    A, B = (torch.cat([x, -x], dim=-3) for x in atoms[:2])
    return ClientFactors(A, B, torch.full((K,), 1 / K, dtype=torch.float64))


@pytest.mark.parametrize("K", [2, 8])
def test_twins_of_opposite_signs_do_not_cancel(K):
    """FedIT's mean is zero there, and no sweep leaves it."""
    atoms = cancelling(4, K, 3, 14, 12)
    for found in (solve_mixes(atoms, 300), solve_in_memory(atoms, 300)):
        assert float(error(atoms, *found)) < 0.01


@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("K", [3, 10, 30])
def test_noise_is_not_taken_for_turned_frames(K, spread):
    """From other starts noisy cohorts gain nothing, and took up to six times as long."""
    atoms = drawn(K, K, 300, 280, 4, spread)
    assert not least_squares.is_rotated(gram_matrices(atoms), atoms.w).any()
    assert not matrix_free._is_rotated(*sides(atoms), atoms.w).any()


@pytest.mark.parametrize(
    "atoms",
    [
        turned(0, 3, 8, 300, 280, 0.5),
        turned(1, 10, 4, 300, 280, 1.0),
        turned(2, 30, 4, 60, 50, 2.0),
        turned(3, 6, 3, 14, 12, 0.1, 0.4),
        cancelling(4, 2, 3, 14, 12),
        cancelling(5, 8, 3, 14, 12),
        turned(6, 6, 3, 14, 12, 0.5, 0.6, torch.float32),
    ],
    ids=["3", "10", "30", "a little", "two that cancel", "eight that cancel", "float32"],
)
def test_turned_frames_are_seen_in_noise_and_where_their_mean_is_zero(atoms):
    assert least_squares.is_rotated(gram_matrices(atoms), atoms.w).all()
    assert matrix_free._is_rotated(*sides(atoms), atoms.w).all()
    lazily = (matrix_free._Streaming(list(x.unbind(-3)), atoms.w) for x in (atoms.B, atoms.A.mT))
    assert matrix_free._is_rotated(*lazily, atoms.w).all()


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("K", "r", "m", "n"), [(3, 2, 9, 7), (4, 3, 60, 50), (10, 4, 20, 16)])
def test_noise_is_mixed_as_well_as_many_starts_find(K, r, m, n, spread):
    atoms = drawn(1, K, m, n, r, spread, stack=(1,))
    assert float(error(atoms, *solve_mixes(atoms, 300))) <= dense_least(atoms, 24) + 0.005


@pytest.mark.parametrize(
    ("K", "m", "n", "r", "rows"),
    [(1, 9, 8, 3, 2), (5, 17, 13, 3, 14), (4, 12, 31, 2, 7), (6, 23, 9, 5, 29), (6, 23, 9, 5, 30), (40, 30, 11, 1, 16)],
)
@pytest.mark.parametrize("kind", ["frames", "noise", "like"])
def test_above_the_rows_of_gram_space_the_mixes_are_as_good(K, m, n, r, rows, kind, monkeypatch):
    """On either side of the bound, by held and by streamed factors: the error from Gram matrices without a bound."""
    atoms = turned(3, K, r, m, n, 0.3) if kind == "frames" else drawn(3, K, m, n, r, 2.0 if kind == "noise" else 0.1)
    stack = atoms.A.shape[:-3]
    best = error(atoms, *(x.reshape(*stack, K) for x in als(gram_matrices(atoms), atoms.w, False, 300)))
    monkeypatch.setattr(matrix_free, "USUAL", 0)
    monkeypatch.setattr(matrix_free, "GRAM_ROWS", rows)
    ways = []
    for name in ("gram_matrices", "_alternate"):
        real = getattr(matrix_free, name)
        monkeypatch.setattr(matrix_free, name, lambda *a, real=real, name=name: ways.append(name) or real(*a))
    found = solve_mixes(atoms, 300)
    odd = K > 1 and (kind == "frames" or bool(least_squares.is_rotated(gram_matrices(atoms), atoms.w).any()))
    assert ways == ["gram_matrices" if odd and K * r <= rows else "_alternate"]
    assert float(error(atoms, *found)) <= float(best) + 0.005
    lazily = solve_streaming(list(atoms.A.unbind(-3)), list(atoms.B.unbind(-3)), atoms.w, 60)
    assert float(error(atoms, *lazily)) <= float(best) + 0.005
