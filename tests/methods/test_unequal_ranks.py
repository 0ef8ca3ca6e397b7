"""FlexLoRA and HetLoRA with clients of different ranks, against dense formulas."""

import pytest
import torch

from fedlora.adapters import LoRA
from fedlora.methods.flexlora import FlexLoRA
from fedlora.methods.hetlora import RANK, HetLoRA
from fedlora.types import Turn, Work
from tests.fixtures.cohort import Cohort

RANKS = [2, 6, 3, 1]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_flexlora_serves_each_client_its_best_rank(seed, rslora):
    c = Cohort.drawn(seed, r=6, ranks=RANKS)
    method = FlexLoRA(LoRA(6, 5.0, rslora))
    P, S, Qt = torch.linalg.svd(c.update(5.0, rslora))
    shared = c.served(method)
    for rank in RANKS:
        own = method.receive(shared, {}, Turn(2, 0, rank))
        assert own["A"].shape[0] == rank
        best = (P[:, :rank] * S[:rank]) @ Qt[:rank]
        torch.testing.assert_close(method.adapter.delta(own).dense(), best)
        s = 5.0 / (rank**0.5 if rslora else rank)
        torch.testing.assert_close((s * own["B"]).norm(dim=0), own["A"].norm(dim=1))  # √S on both sides


@pytest.mark.parametrize("seed", range(10))
def test_hetlora_pads_and_weights_by_size(seed):
    c = Cohort.drawn(seed, r=6, ranks=RANKS)
    method = HetLoRA(LoRA(6, 5.0), weighting="examples" if seed % 2 else "uniform")
    w = c.w if seed % 2 else [0.25] * 4
    s, full = c.scales(5.0), 5.0 / 6
    sizes = torch.stack([wk * (sk * B @ A).norm() for wk, sk, B, A in zip(w, s, c.B, c.A)])
    A, B = torch.zeros(6, 8).double(), torch.zeros(11, 6).double()
    for p, sk, Ak, Bk in zip(sizes / sizes.sum(), s, c.A, c.B):
        A[: len(Ak)] += p * Ak
        B[:, : len(Ak)] += p * (sk / full) * Bk
    found = c.served(method)
    torch.testing.assert_close(found["A"], A)
    torch.testing.assert_close(found["B"], B)
    own = method.receive(found, {}, Turn(2, 0, 3))
    torch.testing.assert_close(method.adapter.delta(own).dense(), full * B[:, :3] @ A[:3])


def test_hetlora_where_nobody_moved_is_the_plain_mean():
    c = Cohort.drawn(0)
    still = Cohort(c.A, [0 * B for B in c.B], c.examples, c.start)
    torch.testing.assert_close(still.served(HetLoRA(LoRA(3)))["A"], sum(c.A) / 4)


def work(shrink: float) -> Work:
    g = torch.Generator().manual_seed(0)
    start = {"A": torch.randn(8, 5, generator=g), "B": torch.randn(7, 8, generator=g)}
    end = {"A": start["A"].clone(), "B": start["B"].clone()}
    end["B"][:, 6:] *= shrink
    return Work(start, end, frozenset("AB"))


def test_hetlora_prunes_a_tail_that_shrank_and_remembers():
    method = HetLoRA(LoRA(8, 4.0), decay=0.75, tail_penalty=0.1)
    w, turn = work(0.5), Turn(0, 0, 8)
    sent = method.send(w, turn)
    assert sent["A"].shape == (6, 5) and sent["B"].shape == (7, 6)
    kept = method.keep(w, sent, turn)
    assert int(kept[RANK]) == 6
    torch.testing.assert_close(  # the update that is left is the leading part of the one it trained
        method.adapter.delta(sent).dense(), 0.5 * w.end["B"][:, :6] @ w.end["A"][:6]
    )
    assert method.receive(w.end, kept, turn)["A"].shape == (6, 5)
    grown = method.send(work(2.0), turn)
    assert grown["A"].shape == (8, 5)


def test_hetloras_penalty_is_the_product_of_the_tails_norms():
    method = HetLoRA(LoRA(8, 4.0), decay=0.75, tail_penalty=0.1)
    layer = {leaf: x.requires_grad_() for leaf, x in work(1.0).end.items()}
    found = method.penalty(layer)
    torch.testing.assert_close(found, 0.1 * layer["A"][6:].norm() * layer["B"][:, 6:].norm())
    zero = {"A": layer["A"], "B": torch.zeros(7, 8, requires_grad=True)}
    (gradient,) = torch.autograd.grad(method.penalty(zero), [zero["B"]])
    assert gradient.isfinite().all(), "the norm at the start, where B is zero, has no slope of its own"
    assert HetLoRA(LoRA(8)).penalty(layer) == 0.0


@pytest.mark.parametrize("settings", [{"decay": 0.0}, {"decay": 1.5}, {"tail_penalty": -1.0}])
def test_hetlora_mistakes(settings):
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))} is"):
        HetLoRA(**settings)
