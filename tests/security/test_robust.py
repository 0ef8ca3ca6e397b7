"""Robust rules against dense oracles, and what no client can do about its own standing."""

import pytest
import torch

from fedlora.adapters import LoRA, LoRASB, MultiHead, VeRA
from fedlora.methods.fedex_lora import FedExLoRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedsa_lora import FedSALoRA
from fedlora.methods.ffa_lora import FFALoRA
from fedlora.methods.flexlora import FlexLoRA
from fedlora.methods.flora import FLoRA
from fedlora.methods.ravan import Ravan
from fedlora.methods.svd import BestRank
from fedlora.rounds import Received, client_turn, server_turn
from fedlora.runs.config import build
from fedlora.security.robust import ROBUST_RULES
from fedlora.security.robust._base import UpdateGeometry, reweigh_uploads
from fedlora.security.validation.update_norms import gram_matrix
from fedlora.types import Turn
from tests.fixtures.laws import Nudge
from tests.fixtures.uploads import M, N, R, dense, turned, world

CASES = {
    "fedit": (FedIT(LoRA(R, 6.0)), {"head": True}),
    "one factor": (FFALoRA(LoRA(R, 6.0)), {}),
    "unequal ranks": (FlexLoRA(LoRA(R, 6.0)), {"ranks": [1, 3, 2, 3, 1]}),
    "fresh starts": (FLoRA(LoRA(R, 6.0)), {}),
    "heads, some each": (Ravan(MultiHead(3, 2)), {"ranks": [1, 3, 2, 3, 1]}),
    "cores": (FedIT(LoRASB(3)), {}),
    "vectors": (FedIT(VeRA(4)), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_inner_products_are_those_of_the_updates_written_out(case):
    method, options = CASES[case]
    rules, shared, uploads = world(method, **options)
    D = torch.stack([dense(rules, shared, u) for u in uploads])
    assert D.norm() > 0
    torch.testing.assert_close(gram_matrix(rules, shared, uploads), D @ D.T, rtol=1e-5, atol=1e-5)


def test_where_a_factor_stays_with_its_client_the_other_counts_as_it_is():
    rules, shared, uploads = world(FedSALoRA(LoRA(R, 6.0)))
    X = torch.stack(
        [torch.cat([(u.tree[p]["A"] - shared[p]["A"]).double().reshape(-1) for p in rules]) for u in uploads]
    )
    torch.testing.assert_close(gram_matrix(rules, shared, uploads), X @ X.T)


@pytest.mark.parametrize("name", ROBUST_RULES.names())
def test_no_client_changes_a_verdict_by_its_choice_of_factors(name):
    rules, shared, uploads = world(FedIT(LoRA(R, 6.0)), K=9)
    draws = torch.Generator().manual_seed(3)
    others = [
        turned(u, torch.eye(R) * (1 + k) + 0.2 * torch.randn(R, R, generator=draws)) for k, u in enumerate(uploads)
    ]
    rule = ROBUST_RULES.load(name)()
    seen = [
        UpdateGeometry(gram_matrix(rules, shared, some), torch.arange(1, 10).double() / 45, 5)
        for some in (uploads, others)
    ]
    for one, other in zip(*(rule.judge(s) for s in seen)):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def cloud(K=10, bad=3, far=50.0, dimension=6, seed=0, tight=0.01):
    """Honest points about (1, 1, ..), and the last few together far away: a small, dense world."""
    g = torch.Generator().manual_seed(seed)
    honest = 1 + 0.1 * torch.randn(K - bad, dimension, generator=g).double()
    hostile = far + tight * torch.randn(bad, dimension, generator=g).double()
    D = torch.cat([honest, hostile])
    return D, UpdateGeometry(D @ D.T, torch.full((K,), 1 / K, dtype=torch.float64), 1)


def counted(verdict, D):
    """The mean that the verdict comes to."""
    c = verdict.factors / verdict.factors.sum()
    return (c * (1 if verdict.shrinkage is None else verdict.shrinkage)) @ D


def test_krum_and_multi_krum_by_hand():
    D, seen = cloud()
    f, K = 3, 10
    by_hand = [sorted(float((a - b).square().sum()) for b in D)[1 : 1 + K - f - 2] for a in D]
    sums = torch.tensor([sum(x) for x in by_hand])
    krum = ROBUST_RULES.load("krum")().judge(seen).factors
    assert krum.nonzero().flatten().tolist() == [int(sums.argmin())]
    multi = ROBUST_RULES.load("multi-krum")().judge(seen).factors
    assert set(multi.nonzero().flatten().tolist()) == set(sums.argsort()[: K - f].tolist())


def test_the_geometric_median_is_the_point_of_least_distance():
    D, seen = cloud(bad=2)
    w = torch.arange(1, 11).double() / 55
    c = ROBUST_RULES.load("geometric-median")().judge(seen._replace(w=w)).factors * w
    assert float(c.sum()) == pytest.approx(1)
    z = (c @ D).clone().requires_grad_()
    total = (w * (D - z).norm(dim=1)).sum()
    assert float(torch.autograd.grad(total, z)[0].norm()) < 1e-4, "its gradient vanishes there"


def test_trimmed_leaves_out_the_farthest():
    _, seen = cloud()
    factors = ROBUST_RULES.load("trimmed")().judge(seen).factors
    assert factors.tolist() == [1.0] * 7 + [0.0] * 3


def test_median_of_means_takes_a_group_among_the_honest_means():
    for seed in range(20):
        _, seen = cloud(K=15, bad=3, seed=seed)
        factors = ROBUST_RULES.load("median-of-means")(attackers=0.2).judge(seen._replace(seed=seed)).factors
        members = factors.nonzero().flatten().tolist()
        assert 2 <= len(members) <= 3
        assert not set(members) & {12, 13, 14}


def test_clip_scales_the_update_and_nothing_else():
    _, seen = cloud(bad=2, far=9.0)
    pulled = ROBUST_RULES.load("clip")(limit=1.0).judge(seen).shrinkage
    most = seen.norms.median()
    torch.testing.assert_close(pulled * seen.norms, seen.norms.clamp_max(most))
    absolute = ROBUST_RULES.load("clip")(norm=0.5).judge(seen).shrinkage
    torch.testing.assert_close(absolute * seen.norms, torch.full_like(seen.norms, 0.5))


@pytest.mark.parametrize("name", sorted(set(ROBUST_RULES.names()) - {"clip"}))
@pytest.mark.parametrize("far", [1e2, 1e6])
def test_below_its_share_a_hostile_group_moves_nothing_far(name, far):
    D, seen = cloud(far=far, bad=2)
    at = counted(ROBUST_RULES.load(name)(attackers=0.2).judge(seen), D)
    assert (at - 1).abs().max() < 1.0
    assert (D.mean(0) - 1).abs().max() > 10, "the plain mean is carried away"


def test_beyond_half_every_rule_breaks():
    D, seen = cloud(K=10, bad=7, far=100.0)
    for name in set(ROBUST_RULES.names()) - {"clip"}:
        assert (counted(ROBUST_RULES.load(name)(attackers=0.3).judge(seen), D) - 1).abs().max() > 50, name


EXACT = {
    "svd of full rank": BestRank(LoRA(7, 6.0)),
    "fedex": FedExLoRA(LoRA(R, 6.0)),
    "flora": FLoRA(LoRA(R, 6.0)),
    "ffa": FFALoRA(LoRA(R, 6.0)),
    "ravan": Ravan(MultiHead(3, 2)),
}


@pytest.mark.parametrize("case", EXACT)
def test_a_clipped_round_ends_at_the_mean_of_the_scaled_updates(case):
    method = EXACT[case]
    shared = {"w": method.adapter.init(M, N, 0)}
    rules = {"w": method}
    uploads = []
    for k in range(4):
        turn = Turn(2, k, method.adapter.budget, 10 + k)
        uploads.append(Received(turn, 1 + k, client_turn(rules, shared, {}, turn, Nudge(20 + k, 0.1 + 0.3 * k))[0]))
    D = torch.stack([dense(rules, shared, u) for u in uploads])
    w = torch.tensor([1.0] * 4 if method.weighting == "uniform" else [1.0, 2.0, 3.0, 4.0]).double()
    scale = (D.norm(dim=1).median() / D.norm(dim=1)).clamp_max(1.0)
    assert scale.min() < 0.9
    found, record = reweigh_uploads(ROBUST_RULES.load("clip")(), method, rules, shared, uploads, 0, 0)
    served = server_turn(rules, shared, found)
    delta = method.adapter.delta({k: x.double() for k, x in served.shared["w"].items()}).dense()
    delta = delta + sum(f.dense().double() for f in served.base_updates.get("w", ()))
    start = method.adapter.delta(shared["w"]).dense().double()
    expected = (w / w.sum() * scale) @ D
    torch.testing.assert_close((delta - start).reshape(-1), expected, rtol=1e-3, atol=1e-4)
    assert list(record["factors"].values()) == pytest.approx(scale.tolist(), rel=1e-4)


def test_who_is_left_out_leaves_no_trace():
    rules, shared, uploads = world(FedIT(LoRA(R, 6.0)), K=6)
    uploads[2] = uploads[2]._replace(
        tree={p: {k: 50 * x for k, x in layer.items()} for p, layer in uploads[2].tree.items()}
    )
    found, record = reweigh_uploads(
        ROBUST_RULES.load("trimmed")(attackers=0.2), FedIT(LoRA(R, 6.0)), rules, shared, uploads, 0, 0
    )
    assert record["kept"] == [0, 1, 3, 4, 5]
    a, b = (server_turn(rules, shared, some).shared for some in (found, [u for u in uploads if u.turn.client != 2]))
    assert all(torch.equal(a[p][leaf], b[p][leaf]) for p in a for leaf in a[p])


def test_two_uploads_are_too_few():
    rules, shared, uploads = world(FedIT(LoRA(R, 6.0)), K=2)
    found, record = reweigh_uploads(ROBUST_RULES.load("krum")(), FedIT(LoRA(R, 6.0)), rules, shared, uploads, 0, 0)
    assert found == [] and record["why"] == "2 uploads; a robust aggregator needs 3"


TABLE = {"model": {"name": "demo-vit"}, "task": {"name": "image-classification", "data": "digits"}}
REFUSED = {
    "hidden": ({"robust": {"name": "krum"}, "flower": {"secure_aggregation": True}}, "secure_aggregation hides them"),
    "own weights": ({"robust": {"name": "clip"}, "method": {"name": "hetlora"}}, "weights of its own"),
    "a majority": ({"robust": {"name": "krum", "attackers": 0.5}}, "below 0.5"),
    "a name": ({"robust": {"name": "krumm"}}, "did you mean 'krum'"),
    "no name": ({"robust": {"attackers": 0.1}}, r"set robust.name"),
    "an attack": ({"attack": {"name": "sign-flipp"}}, "did you mean 'sign-flip'"),
    "no pair": ({"attack": {"name": "rescale"}, "method": {"name": "ravan"}}, "pair of LoRA factors"),
    "no text": ({"attack": {"name": "backdoor"}}, "puts a word into texts"),
    "no uploads": ({"attack": {"name": "copy"}, "flower": {"secure_aggregation": True}}, "hides these"),
    "validation": ({"validation": {"norm_limit": 1.0}}, "validation.norm_limit is 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_said_in_a_sentence(case):
    table, why = REFUSED[case]
    with pytest.raises(ValueError, match=why):
        build({**TABLE, **table})


def test_tables_survive_their_own_file():
    table = {**TABLE, "robust": {"name": "clip", "limit": 2.0}, "attack": {"name": "copy", "clients": [1]}}
    config = build(table)
    assert build(config.table).table == config.table
    assert config.table["robust"] == {"name": "clip", "attackers": 0.3, "limit": 2.0}


def test_the_rules_are_found_by_looking():
    assert ROBUST_RULES.names() == ["clip", "geometric-median", "krum", "median-of-means", "multi-krum", "trimmed"]
