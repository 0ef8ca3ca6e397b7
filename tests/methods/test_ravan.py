"""Ravan: heads, scores, budgets and bases."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapters import LoRA, MultiHead
from fedlora.methods.ravan import Ravan
from fedlora.rounds import Received, server_turn
from fedlora.schema import ConfigError
from fedlora.types import Turn, Work

ADAPTER = MultiHead(4, 3)
M, N = 14, 17


def started(adapter=ADAPTER):
    layer = {leaf: x.double() for leaf, x in adapter.init(M, N, 0).items()}
    g = torch.Generator().manual_seed(3)
    return layer | {core: torch.randn(layer[core].shape, generator=g).double() for core in adapter.cores}


def trained(layer, seed, leaves):
    g = torch.Generator().manual_seed(seed)
    return {k: x + torch.randn(x.shape, generator=g).double() if k in leaves else x for k, x in layer.items()}


def test_each_head_is_the_uniform_mean_over_those_that_trained_it():
    method, layer = Ravan(ADAPTER), started()
    heads = [{0, 1}, {1, 2}, {1}]
    ends = [trained(layer, k, {f"{kind}{i}" for i in own for kind in "Hs"}) for k, own in enumerate(heads)]
    sent = [
        method.send(Work(layer, end, frozenset(f"{kind}{i}" for i in own for kind in "Hs")), Turn(0, k, len(own)))
        for k, (end, own) in enumerate(zip(ends, heads))
    ]
    uploads = [Received(Turn(0, k, 2), n, {"w": s}) for k, (s, n) in enumerate(zip(sent, (5, 90, 1)))]
    made = server_turn({"w": method}, {"w": layer}, uploads).shared["w"]
    product = [[end[f"s{i}"] * end[f"H{i}"] for i in range(4)] for end in ends]
    torch.testing.assert_close(made["H0"], product[0][0])
    torch.testing.assert_close(made["H1"], sum(p[1] for p in product) / 3)
    torch.testing.assert_close(made["H2"], product[1][2])
    assert made["H3"] is layer["H3"], "a head nobody trained stays, and need not be sent"
    assert all(made[f"s{i}"] is layer[f"s{i}"] for i in range(4)), "scales start at one each round"


def test_budgets_choose_so_many_heads():
    for budget in (1, 2, 4):
        chosen = Ravan(ADAPTER).trains(started(), Turn(0, 0, budget, seed=5), dict)
        assert sorted(leaf[0] for leaf in chosen) == ["H"] * budget + ["s"] * budget
    assert Ravan(ADAPTER, train_scales=False).trains(started(), Turn(0, 0, 4), dict) == set(ADAPTER.cores)


def test_scores():
    layer = started() | {"H2": 9 * torch.ones(3, 3).double(), "H0": 8 * torch.ones(3, 3).double()}
    assert Ravan(ADAPTER, score="weight").trains(layer, Turn(0, 0, 2), dict) == {"H2", "s2", "H0", "s0"}
    gradient = {core: torch.full((3, 3), float(i == 3)) for i, core in enumerate(ADAPTER.cores)}
    assert Ravan(ADAPTER, score="gradient").trains(layer, Turn(0, 0, 1), lambda: gradient) == {"H3", "s3"}
    picks = {Ravan(ADAPTER).trains(layer, Turn(0, 0, 1, seed=s), dict) for s in range(40)}
    assert len(picks) == 4, "random takes every head at some time"


def test_ties_are_broken_by_a_seeded_draw():
    flat = started() | {core: torch.ones(3, 3).double() for core in ADAPTER.cores}
    zero = started() | {core: torch.zeros(3, 3).double() for core in ADAPTER.cores}
    for layer in (flat, zero):
        picks = [Ravan(ADAPTER, score="weight").trains(layer, Turn(0, 0, 1, seed=s), dict) for s in range(40)]
        again = [Ravan(ADAPTER, score="weight").trains(layer, Turn(0, 0, 1, seed=s), dict) for s in range(40)]
        assert picks == again and len(set(picks)) == 4


def test_the_update_is_the_sum_over_heads():
    for basis in ("gram_schmidt", "normal", "constant", "shared_subspace"):
        layer = started(replace(ADAPTER, basis=basis)) | {"s1": torch.tensor([[2.5]]).double()}
        A, B = layer["A"].split(3, 0), layer["B"].split(3, 1)
        dense = sum(layer[f"s{i}"] * B[i] @ layer[f"H{i}"] @ A[i] for i in range(4))
        torch.testing.assert_close(ADAPTER.delta(layer).dense(), dense)
        x = torch.randn(2, 5, N, dtype=torch.float64)
        torch.testing.assert_close(ADAPTER.forward(x, layer), x @ dense.T)


def test_bases():
    made = {
        b: replace(ADAPTER, basis=b).init(M, N, 0) for b in ("gram_schmidt", "normal", "constant", "shared_subspace")
    }
    A, B = made["gram_schmidt"]["A"], made["gram_schmidt"]["B"]
    torch.testing.assert_close(A @ A.T, torch.eye(12))
    torch.testing.assert_close(B.T @ B, torch.eye(12))
    assert torch.equal(made["constant"]["A"][:3], made["constant"]["A"][3:6])
    assert torch.linalg.matrix_rank(made["shared_subspace"]["A"]) == 3
    assert torch.linalg.matrix_rank(made["normal"]["A"]) == 12
    wide = MultiHead(4, 16, basis="normal").init(512, 256, 0)
    assert float(wide["A"].var() * 256) == pytest.approx(1, rel=0.05), "variance 1/n; N(0, 1) is far too large"
    assert float(wide["B"].var() * 512) == pytest.approx(1, rel=0.05)


def test_gram_schmidt_needs_room():
    with pytest.raises(
        ConfigError, match=r"heads \* head_rank <= min\(m, n\), but 4 \* 5 = 20 is more than 14"
    ) as found:
        MultiHead(4, 5).init(14, 17, 0)
    assert 'set adapter.head_rank to at most 3, or adapter.basis to "normal"' in str(found.value)
    MultiHead(4, 3).init(14, 17, 0)
    MultiHead(4, 5, basis="normal").init(14, 17, 0)
    with pytest.raises(ConfigError, match="set adapter.heads to at most 14, or"):
        MultiHead(16, 1).init(14, 17, 0)
    MultiHead(14, 1).init(14, 17, 0)


def test_the_budget_matches_a_lora():
    adapter = MultiHead.like(LoRA(8))
    m, n = 384, 1536
    r = adapter.size(m, n)
    assert adapter.heads * r * r <= (m + n) * 8 < adapter.heads * (r + 1) ** 2
