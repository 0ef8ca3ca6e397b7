"""FLoRA-NA between the best rank and FedIT, against a dense oracle that shares no line with it."""

import pytest
import torch

from fedlora.adapters import LoRA
from fedlora.linalg import least_squares
from fedlora.methods.fedit import FedIT
from fedlora.methods.flora_na import FLoRANA
from fedlora.rounds import Received, server_turn
from fedlora.types import Turn
from tests.fixtures.cohort import Cohort, lora


@pytest.mark.parametrize("seed", range(200))
def test_error_lies_between_the_best_rank_and_fedit(seed):
    g = torch.Generator().manual_seed(seed)
    K, r, m, n = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 9), (1, 6), (6, 30), (6, 30)))
    c = Cohort.drawn(seed, K, r, m, n, spread=float(torch.rand((), generator=g) * 2))
    found = c.error(FLoRANA(lora(c)))
    slack = 1e-9 * float(c.exact.norm())
    assert c.best - slack <= found <= c.error(FedIT(lora(c))) + slack


def dense_als(c: Cohort, sweeps: int):
    """The same sweeps with ``torch.linalg.lstsq`` on written-out products."""
    p = q = torch.tensor(c.w, dtype=torch.float64)
    target = c.exact.flatten()
    for _ in range(sweeps):
        A = sum(x * Ak for x, Ak in zip(q, c.A))
        p = torch.linalg.lstsq(torch.stack([(Bk @ A).flatten() for Bk in c.B], 1), target[:, None]).solution[:, 0]
        B = sum(x * Bk for x, Bk in zip(p, c.B))
        q = torch.linalg.lstsq(torch.stack([(B @ Ak).flatten() for Ak in c.A], 1), target[:, None]).solution[:, 0]
    return sum(x * Bk for x, Bk in zip(p, c.B)) @ sum(x * Ak for x, Ak in zip(q, c.A))


@pytest.mark.parametrize("seed", range(20))
def test_gram_space_equals_the_dense_sweeps(seed):
    c = Cohort.drawn(seed, K=3)
    w = torch.tensor(c.w, dtype=torch.float64)
    grams = least_squares.gram_matrices(least_squares.ClientFactors(torch.stack(c.A)[None], torch.stack(c.B)[None], w))
    p, q, _ = least_squares.sweep_from(grams, w, w[None, None], False, 4)
    found = sum(x * B for x, B in zip(p[0, 0], c.B)) @ sum(x * A for x, A in zip(q[0, 0], c.A))
    torch.testing.assert_close(found, dense_als(c, 4), rtol=1e-7, atol=1e-7)


def test_more_sweeps_are_never_worse():
    c = Cohort.drawn(5, K=6)
    errors = [c.error(FLoRANA(lora(c), sweeps=s)) for s in (0, 1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(c.error(FedIT(lora(c))))


def test_one_client_and_common_factor_are_exact():
    c = Cohort.drawn(6)
    one = Cohort(c.A[:1], c.B[:1], c.examples[:1], c.start)
    torch.testing.assert_close(one.served(FLoRANA(lora(c)))["A"], c.A[0])
    common = Cohort([c.A[0]] * 4, c.B, c.examples, c.start)
    assert common.error(FLoRANA(lora(c))) < 1e-9


def test_tiny_factors_are_fitted_as_well_as_large_ones():
    """A plain squared error at LoRA's magnitudes drowns in the optimiser's epsilon; least squares do not."""
    c = Cohort.drawn(7)
    small = Cohort([1e-4 * A for A in c.A], [1e-5 * B for B in c.B], c.examples, c.start)
    a, b = c.error(FLoRANA(lora(c))) / c.exact.norm(), small.error(FLoRANA(lora(c))) / small.exact.norm()
    assert float(b) == pytest.approx(float(a), rel=1e-5)


def test_zero_updates_stay_zero():
    c = Cohort.drawn(8)
    zero = Cohort(c.A, [0 * B for B in c.B], c.examples, c.start)
    layer = zero.served(FLoRANA(lora(c)))
    assert torch.equal(layer["B"], torch.zeros_like(layer["B"])) and layer["A"].isfinite().all()


def test_an_anchor_can_only_help():
    c = Cohort.drawn(9)
    assert c.error(FLoRANA(lora(c), anchor=True, sweeps=30)) <= c.error(FLoRANA(lora(c), sweeps=30)) + 1e-6


def test_one_mix_for_the_whole_model():
    """The sum of squared errors over weights: between FedIT's and what a mix a weight reaches."""
    ones = {"a": Cohort.drawn(1, m=11, n=8), "b": Cohort.drawn(2, m=5, n=17)}
    ones["b"] = Cohort(ones["b"].A, ones["b"].B, ones["a"].examples, ones["b"].start)

    def total(method):
        uploads = [
            Received(Turn(1, k, 3), ones["a"].examples[k], {p: {"A": c.A[k], "B": c.B[k]} for p, c in ones.items()})
            for k in range(4)
        ]
        made = server_turn(dict.fromkeys(ones, method), {p: c.start for p, c in ones.items()}, uploads).shared
        return sum(float((made[p]["B"] @ made[p]["A"] - c.exact).square().sum()) for p, c in ones.items()), made

    adapter = LoRA(3, 5.0)
    (own, _), (joint, made), (fedit, _) = (
        total(m) for m in (FLoRANA(adapter, sweeps=30), FLoRANA(adapter, scope="model", sweeps=30), FedIT(adapter))
    )
    assert own <= joint + 1e-9 <= fedit + 2e-9
    # One (p, q) for all: the mix that is read off one weight's served factors rebuilds the other's.
    p = torch.linalg.lstsq(
        torch.stack([B.flatten() for B in ones["a"].B], 1), made["a"]["B"].flatten()[:, None]
    ).solution
    torch.testing.assert_close(sum(x * B for x, B in zip(p[:, 0], ones["b"].B)), made["b"]["B"])


@pytest.mark.parametrize("scope", ["weight", "model"])
@pytest.mark.parametrize(("K", "least", "most"), [(1, 0, 1e-3), (2, 0.036, 0.06), (3, 0.05, 0.1), (10, 0.2, 0.5)])
def test_adam_aims_at_the_sum_and_what_its_page_says_it_misses(K, least, most, scope):
    """Towards a mean it ended at 6.2 times the update's norm with ten clients."""
    c = Cohort.drawn(10, K=K, spread=0.3)
    method = FLoRANA(lora(c), solver="adam", scope=scope)
    assert least <= c.error(method) / float(c.exact.norm()) <= most
    assert c.error(FLoRANA(lora(c))) <= c.error(method) + 1e-6 * float(c.exact.norm())


def test_the_authors_way_is_not_taken_without_a_word():
    from tests.fixtures.federation import config

    (note,) = [x for x in config("method={name = 'flora-na', solver = 'adam'}").federation().notes if "solver" in x]
    assert "200 steps" in note and "'als'" in note
    assert not any("solver" in x for x in config("method.name=flora-na").federation().notes)


def test_concentration_is_noted():
    c = Cohort.drawn(11)
    uploads = [Received(Turn(1, k, 3), 1, {"w": {"A": A, "B": B}}) for k, (A, B) in enumerate(zip(c.A, c.B))]
    note = server_turn({"w": FLoRANA(lora(c))}, {"w": c.start}, uploads).notes["w"]["concentration"]
    assert 1 / 4 <= note <= 1


@pytest.mark.parametrize("scope", ["weight", "model"])
def test_the_authors_way_survives_factors_that_point_away_from_their_mean(scope):
    """``⟨B̄ Ā, W*⟩`` is negative here; taken for ``‖W*‖²`` it once made the loss overflow."""
    c = Cohort.drawn(11)
    odd = Cohort([c.A[0], -1.1 * c.A[0]], [c.B[0], -0.9 * c.B[0]], [1, 1], c.start)
    method = FLoRANA(lora(c), solver="adam", scope=scope)
    assert odd.error(method) / float(odd.exact.norm()) < 1e-3
