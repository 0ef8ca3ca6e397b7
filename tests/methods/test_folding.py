"""FLoRA and FedEx-LoRA: base and factors together are the exact mean, with every scale where it belongs."""

import pytest
import torch

from fedlora.adapters import LoRA
from fedlora.methods.fedex_lora import FedExLoRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.flora import FLoRA
from fedlora.methods.svd import BestRank
from fedlora.types import Turn
from tests.fixtures.cohort import Cohort

RSLORA = [False, True]


@pytest.mark.parametrize("rslora", RSLORA)
@pytest.mark.parametrize("seed", range(10))
def test_flora_stacks_clients_of_any_rank(seed, rslora):
    c = Cohort.drawn(seed, r=6, ranks=[2, 6, 3, 1])
    method = FLoRA(LoRA(6, 5.0, rslora))
    (base_update,) = c.outcome(method).base_updates["weight"]
    torch.testing.assert_close(base_update.dense(), c.update(5.0, rslora))
    assert base_update.U.shape[-1] == 2 + 6 + 3 + 1
    assert c.outcome(method).shared["weight"]["A"] is c.start["A"], "the shared leaves stay, so nothing of them travels"


def test_flora_starts_every_turn_afresh_at_the_clients_rank():
    method, shared = FLoRA(LoRA(6)), {"A": torch.ones(6, 8), "B": torch.ones(11, 6)}
    one, two = (method.receive(shared, {}, Turn(0, 0, 4, seed)) for seed in (1, 2))
    assert one["A"].shape == (4, 8) and one["B"].shape == (11, 4) and not one["B"].any()
    assert not torch.equal(one["A"], two["A"])
    assert torch.equal(one["A"], method.receive(shared, {}, Turn(3, 1, 4, 1))["A"])


@pytest.mark.parametrize("rslora", RSLORA)
@pytest.mark.parametrize("seed", range(10))
def test_fedex_is_fedit_and_its_residual(seed, rslora):
    c = Cohort.drawn(seed)
    method = FedExLoRA(LoRA(3, 5.0, rslora))
    torch.testing.assert_close(c.ends_at(method), c.update(5.0, rslora))
    served, plain = c.served(method), c.served(FedIT(method.adapter))
    assert torch.equal(served["A"], plain["A"]) and torch.equal(served["B"], plain["B"])
    (base_update,) = c.outcome(method).base_updates["weight"]
    s = c.scales(5.0, rslora)[0]
    A, B = (sum(w * x for w, x in zip(c.w, xs)) for xs in (c.A, c.B))
    torch.testing.assert_close(base_update.dense(), s * (c.exact - B @ A))
    assert base_update.U.shape[-1] <= 5 * 3


@pytest.mark.parametrize("seed", range(20))
def test_fedex_with_a_small_residual_lies_between_the_best_rank_and_fedit(seed):
    c = Cohort.drawn(seed, K=6)
    error = float((c.ends_at(FedExLoRA(LoRA(3, 5.0), residual_rank=2)) - c.update(5.0)).norm())
    fedit = float((c.ends_at(FedIT(LoRA(3, 5.0))) - c.update(5.0)).norm())
    best = float(torch.linalg.svdvals(c.update(5.0))[5:].norm())  # any matrix of rank 3 + 2
    residual = torch.linalg.svdvals(c.update(5.0) - c.ends_at(FedIT(LoRA(3, 5.0))))[2:].norm()
    assert best <= error <= fedit
    assert error == pytest.approx(float(residual), rel=1e-6)


def test_the_residual_of_tiny_changes_does_not_cancel():
    """In float32 a residual taken as the difference of two stacks would be noise here."""
    c = Cohort.drawn(3, spread=1e-4)
    single = Cohort(
        [A.float() for A in c.A], [B.float() for B in c.B], c.examples, {k: x.float() for k, x in c.start.items()}
    )
    (base_update,) = single.outcome(FedExLoRA(LoRA(3, 3.0))).base_updates["weight"]
    A, B = (sum(w * x.double() for w, x in zip(c.w, xs)) for xs in (single.A, single.B))
    exact = sum(w * (Bk.double() - B) @ (Ak.double() - A) for w, Bk, Ak in zip(c.w, single.B, single.A))
    assert float((base_update.dense().double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize(
    "method", [FLoRA(LoRA(3, 5.0)), FedExLoRA(LoRA(3, 5.0)), BestRank(LoRA(3, 5.0), fold_rest=True)]
)
def test_one_client_and_one_missing(method):
    c = Cohort.drawn(4)
    c.start["B"] = torch.zeros(11, 3).double()  # as FLoRA's shared factors are
    one = Cohort(c.A[:1], c.B[:1], c.examples[:1], c.start)
    torch.testing.assert_close(one.ends_at(method), 5 / 3 * c.B[0] @ c.A[0])
    two = Cohort(c.A[::2], c.B[::2], c.examples[::2], c.start)
    torch.testing.assert_close(two.ends_at(method), two.update(5.0))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_residual_needs_a_rank(rank):
    with pytest.raises(ValueError, match=f"method.residual_rank is {rank}"):
        FedExLoRA(residual_rank=rank)
