"""LoRA-FAIR and svd, against dense least squares and the dense SVD."""

import pytest
import torch

from fedlora.adapters import LoRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedrot_lora import FedRotLoRA
from fedlora.methods.flexlora import FlexLoRA
from fedlora.methods.flora_na import FLoRANA
from fedlora.methods.hetlora import HetLoRA
from fedlora.methods.lora_fair import LoRAFAIR
from fedlora.methods.svd import BestRank
from tests.fixtures.cohort import Cohort

GAUGES = ["anchor", "rotation", "balanced"]


@pytest.mark.parametrize("mu", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_lora_fair_solves_its_least_squares(seed, mu):
    c = Cohort.drawn(seed)
    A, B = (sum(w * x for w, x in zip(c.w, xs)) for xs in (c.A, c.B))
    # ‖E − D Ā‖² + μ ‖D‖² as one ordinary least-squares problem, row by row
    tall = torch.cat([A.T, mu**0.5 * torch.eye(3).double()])
    goal = torch.cat([(c.exact - B @ A).T, torch.zeros(3, 11).double()])
    D = torch.linalg.lstsq(tall, goal).solution.T
    found = c.served(LoRAFAIR(LoRA(3, 5.0), mu=mu))
    torch.testing.assert_close(found["A"], A)
    torch.testing.assert_close(found["B"], B + D)


@pytest.mark.parametrize("seed", range(50))
def test_lora_fair_without_regularisation_is_never_worse_than_fedit(seed):
    c = Cohort.drawn(seed)
    found = c.error(LoRAFAIR(LoRA(3), mu=0.0))
    assert found <= c.error(FedIT(LoRA(3))) * (1 + 1e-9)
    assert c.error(BestRank(LoRA(3), sweeps=1)) <= found * (1 + 1e-9)  # one more half-sweep


def test_lora_fair_with_a_dead_row_stays_there():
    c = Cohort.drawn(0)
    for A in c.A:
        A[1] = 0
    assert c.served(LoRAFAIR(LoRA(3), mu=0.0))["B"].isfinite().all()


@pytest.mark.parametrize("seed", range(500))
def test_svd_has_the_least_error_of_all_rank_r_methods(seed):
    g = torch.Generator().manual_seed(seed)
    K, r, m, n = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 9), (1, 6), (6, 30), (6, 30)))
    c = Cohort.drawn(seed, K, r, m, n, spread=float(torch.rand((), generator=g) * 2))
    adapter, slack = LoRA(r, 5.0), 1e-9 * float(c.exact.norm())
    found = c.error(BestRank(adapter, gauge=GAUGES[seed % 3]))
    assert found == pytest.approx(c.best, abs=slack)
    others = [FedIT, FLoRANA, FedRotLoRA, LoRAFAIR, HetLoRA, FlexLoRA]
    assert all(found <= c.error(kind(adapter)) + slack for kind in others)
    assert found <= c.error(BestRank(adapter, sweeps=2)) + slack


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("seed", range(20))
def test_flexlora_equals_svd_before_its_gauge(seed, gauge):
    c = Cohort.drawn(seed, ranks=[3, 2, 1, 3])
    flex, svd = (c.served(method) for method in (FlexLoRA(LoRA(3, 5.0)), BestRank(LoRA(3, 5.0), gauge=gauge)))
    torch.testing.assert_close(flex["B"] @ flex["A"], svd["B"] @ svd["A"])


@pytest.mark.parametrize("seed", range(30))
def test_gauges_stay_near_fedits_means(seed):
    c = Cohort.drawn(seed, spread=0.2)
    near = c.served(FedIT(LoRA(3, 5.0)))

    def moved(method):
        layer = c.served(method)
        return float(
            (layer["A"] - near["A"]).norm() / near["A"].norm() + (layer["B"] - near["B"]).norm() / near["B"].norm()
        )

    balanced, rotated, anchored = (moved(BestRank(LoRA(3, 5.0), gauge=g)) for g in ("balanced", "rotation", "anchor"))
    assert anchored < balanced and rotated < balanced
    assert anchored < 0.2


def away(layer, near):
    return sum(float((layer[x] - near[x]).square().sum() / near[x].square().sum()) for x in "AB")


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(15))
def test_the_anchor_is_where_no_map_brings_the_factors_nearer(seed, spread):
    c = Cohort.drawn(seed, spread=spread)
    near = c.served(FedIT(LoRA(3, 5.0)))
    found, turned = (c.served(BestRank(LoRA(3, 5.0), gauge=g)) for g in ("anchor", "rotation"))
    if float(near["A"].norm() * near["B"].norm()) < 0.2 * float(turned["A"].norm() * turned["B"].norm()):
        pytest.skip("the means have cancelled: the rotation is served")
    assert away(found, near) <= away(turned, near) + 1e-9
    g = torch.Generator().manual_seed(seed)
    for _ in range(50):
        X = torch.eye(3).double() + 0.05 * torch.randn(3, 3, generator=g).double()
        moved = {"A": X @ found["A"], "B": found["B"] @ torch.linalg.inv(X)}
        assert away(moved, near) >= away(found, near) * (1 - 5e-3)  # as far as the search goes


def test_the_rotation_is_the_best_orthogonal_one():
    c = Cohort.drawn(1)
    near, found = c.served(FedIT(LoRA(3, 5.0))), c.served(BestRank(LoRA(3, 5.0), gauge="rotation"))

    def distance(T):
        return (T @ found["A"] - near["A"]).square().sum() + (found["B"] @ T.T - near["B"]).square().sum()

    g = torch.Generator().manual_seed(0)
    eye = torch.eye(3).double()
    for _ in range(200):
        T = torch.linalg.qr(torch.randn(3, 3, generator=g).double()).Q
        assert distance(eye) <= distance(T) + 1e-9
        small = torch.matrix_exp(1e-3 * (T - T.T))
        assert distance(eye) <= distance(small) + 1e-12


def test_sweeps_reach_the_best_rank_and_never_go_up():
    c = Cohort.drawn(2, K=6)
    errors = [c.error(BestRank(LoRA(3, 5.0), sweeps=s)) for s in (1, 2, 4, 200)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(c.best, rel=1e-6)
    assert errors[0] < c.error(FedIT(LoRA(3, 5.0)))


@pytest.mark.parametrize("method", [BestRank(LoRA(3, 5.0), gauge="anchor"), BestRank(LoRA(3, 5.0), sweeps=2)])
def test_rows_do_not_die_where_nothing_was_learnt(method):
    """A balanced SVD of a zero update would serve two zero factors, and no gradient would ever move them again."""
    c = Cohort.drawn(3)
    still = Cohort([c.start["A"]] * 4, [0 * B for B in c.B], c.examples, c.start)
    layer = still.served(method)
    torch.testing.assert_close(layer["A"], c.start["A"])
    assert not layer["B"].any()
    half = Cohort([c.start["A"]] * 4, [B * torch.tensor([1.0, 0.0, 1.0]) for B in c.B], c.examples, c.start)
    layer = half.served(method)
    torch.testing.assert_close(layer["A"], c.start["A"])
    assert half.error(method) < 1e-9


def test_an_anchor_that_cannot_hold_gives_way_to_the_rotation():
    """FedIT's mean of opposite factors is nearly zero: nothing can stay near it."""
    c = Cohort.drawn(4, K=2)
    even = Cohort([c.A[0], -c.A[0] + 1e-9], [c.B[0], -c.B[0]], [1, 1], c.start)
    layer = even.served(BestRank(LoRA(3, 5.0)))
    torch.testing.assert_close(layer["B"] @ layer["A"], c.B[0] @ c.A[0], rtol=1e-6, atol=1e-6)
    assert float(layer["B"].norm()) < 10 * float(c.B[0].norm())


def test_more_rank_than_the_weight_has_sides():
    c = Cohort.drawn(5, r=12)
    for gauge in GAUGES:
        assert c.error(BestRank(LoRA(12, 5.0), gauge=gauge)) < 1e-9
