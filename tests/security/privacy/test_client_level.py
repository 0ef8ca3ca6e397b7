"""Clipping and noise at the client level: the formula, its bound, and its distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlora.adapters import Dense, LoRA, MultiHead
from fedlora.methods._base import pick
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedsa_lora import FedSALoRA
from fedlora.methods.flora import FLoRA
from fedlora.methods.ravan import Ravan
from fedlora.methods.rolora import RoLoRA
from fedlora.rounds import Received
from fedlora.security.privacy import Stream, key_of
from fedlora.security.privacy.client_level import clip_change, iterate_leaves, private_turn, protect, starting_leaves
from fedlora.types import Turn

ADAPTER = LoRA(rank=2)
STREAM = Stream(key_of(0))


def world(rule=None, head=True):
    """Rules and a server's tree of two weights and a classifier."""
    rule = rule or FedIT(ADAPTER, "uniform")
    rules = {"a": rule, "b": rule}
    shared = {p: rule.adapter.init(7, 5, i) for i, p in enumerate("ab")}
    if head:
        rules["head"] = FedIT(Dense(), "uniform")
        shared["head"] = {"weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), "bias": torch.zeros(3)}  # fmt: skip
    return rules, shared


def upload(rules, shared, client, size=1.0, seed=0):
    """What a client sends: the leaves of its turn, moved by draws of norm about ``size`` times the root of their number."""
    draws = torch.Generator().manual_seed(1000 * seed + client)
    turn = Turn(0, client, next(iter(rules.values())).adapter.budget, seed=7)
    start = starting_leaves(rules, shared, turn)
    return Received(turn, 3, {p: {leaf: x + size * torch.randn(x.shape, generator=draws) for leaf, x in layer.items()} for p, layer in start.items()})  # fmt: skip


def flat(tree):
    return torch.cat([x.double().flatten() for _, _, x in iterate_leaves(tree)])


def served(rules, shared, uploads, clip=1.0, std=0.0, expected=4.0, stream=STREAM, round=0):
    made = private_turn(rules, shared, Turn(round, 0, 2, seed=7), uploads, clip, std, expected, stream)
    return made.shared


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_without_noise_it_is_the_formula(size):
    rules, shared = world()
    uploads = [upload(rules, shared, k, size) for k in range(3)]
    total = torch.zeros_like(flat(shared))
    for u in uploads:
        moved = flat(u.tree) - flat(shared)
        total += moved * min(1.0, 2.0 / float(moved.norm()))  # over all leaves of all parts together
    expected = flat(shared) + total / 5
    torch.testing.assert_close(
        flat(served(rules, shared, uploads, clip=2.0, expected=5.0)), expected, atol=3e-6, rtol=1e-5
    )


def test_small_changes_are_not_clipped_and_the_plain_mean_comes_out():
    rules, shared = world()
    uploads = [upload(rules, shared, k, 1e-3) for k in range(4)]
    mean = sum(flat(u.tree) for u in uploads) / 4
    torch.testing.assert_close(flat(served(rules, shared, uploads, clip=1e3)), mean, atol=1e-6, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_one_client_more_or_less_moves_the_sum_by_clip_at_most(size, clip, seed, others, absent):
    rules, shared = world()
    rest = [upload(rules, shared, k, 1.0, seed) for k in range(1, others + 1)]
    one = upload(rules, shared, 0, size, seed)
    changed = clip_change({p: dict(x) for p, x in shared.items()}, one.tree, clip)
    assert math.sqrt(sum(float(x.square().sum()) for x in changed.values())) <= clip
    swapped = [] if absent else [upload(rules, shared, 0, 1.0, seed + 1)]
    with_it, without = (served(rules, shared, [*some, *rest], clip, expected=1.0) for some in ([one], swapped))
    away = float((flat(with_it) - flat(without)).norm())
    rounding = 1e-6 * float(flat(with_it).norm() + flat(without).norm())
    assert away <= (1 if absent else 2) * clip + rounding


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_an_upload_of_no_numbers_adds_nothing_and_spoils_nothing(value):
    rules, shared = world()
    good, bad = upload(rules, shared, 0), upload(rules, shared, 1)
    bad.tree["a"]["A"][0, 0] = value
    without, with_it = served(rules, shared, [good]), served(rules, shared, [good, bad])
    assert torch.isfinite(flat(with_it)).all()
    assert float((flat(with_it) - flat(without)).norm()) <= 1 / 4 + 1e-6


def test_the_noise_is_gaussian_of_the_stated_size_on_every_leaf_and_also_on_nobody():
    rules, shared = world(FedIT(LoRA(rank=40), "uniform"))
    draws = []
    for round in range(20):
        noisy = served(rules, shared, [], std=3.0, expected=4.0, round=round)
        draws.append((flat(noisy) - flat(shared)) * 4 / 3)
    z = torch.cat(draws)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z)) and abs(float(z.std()) - 1) < 4 / math.sqrt(2 * len(z))
    assert not torch.equal(draws[0], draws[1]), "each round draws anew"
    halves = torch.stack(draws)
    assert abs(float(torch.corrcoef(halves[:, :100].T.contiguous())[0, 1:].mean())) < 0.1, "coordinates are independent"


def test_the_noise_on_a_sum_does_not_depend_on_who_sent():
    rules, shared = world()
    uploads = [upload(rules, shared, k, 1e-4) for k in range(4)]
    quiet, noisy = (served(rules, shared, uploads, clip=1e6, std=s) for s in (0.0, 2.0))
    empty = served(rules, shared, [], clip=1e6, std=2.0)
    torch.testing.assert_close(flat(noisy) - flat(quiet), flat(empty) - flat(shared), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "rule,sent",
    [
        (FedIT(ADAPTER, "uniform"), {"A", "B"}),
        (FedSALoRA(ADAPTER, "uniform"), {"A"}),
        (RoLoRA(ADAPTER, "uniform"), {"B"}),
        (Ravan(MultiHead(2, 2)), {"H0", "H1"}),
    ],
)
def test_what_is_covered_is_what_is_sent(rule, sent):
    rules, shared = world(rule, head=False)
    assert set(starting_leaves(rules, shared, Turn(0, 0, 2))["a"]) == sent
    noisy = served(rules, shared, [], std=1.0)
    moved = {leaf for leaf, x in noisy["a"].items() if x is not shared["a"][leaf]}
    assert moved == sent, "what nobody sends stays the same object, and costs nothing to deliver"


def test_an_upload_with_other_leaves_or_shapes_is_refused():
    rules, shared = world()
    u = upload(rules, shared, 0)
    short = {**u.tree, "a": pick(u.tree["a"], {"A"})}
    wrong = {**u.tree, "a": {**u.tree["a"], "B": u.tree["a"]["B"][:, :1]}}
    for tree in (short, wrong):
        with pytest.raises(ValueError, match=r"'B' of 'a' was not sent, or with another shape"):
            served(rules, shared, [u._replace(tree=tree)])


def test_noise_on_an_upload_is_measured_from_what_every_party_knows():
    """FLoRA starts every turn afresh: its change is measured from that start, not from the server's leaves."""
    rules, shared = world(FLoRA(ADAPTER, "uniform"), head=False)
    u = upload(rules, shared, 1, 5.0)
    out = protect(rules, shared, u.turn, u.tree, 2.0, 0.0, STREAM)
    start = starting_leaves(rules, shared, u.turn)
    assert not torch.equal(start["a"]["A"], shared["a"]["A"])
    moved = flat(out) - flat(start)
    assert float(moved.norm()) == pytest.approx(2.0, rel=1e-4)
    torch.testing.assert_close(moved / 2, (flat(u.tree) - flat(start)) / (flat(u.tree) - flat(start)).norm(), atol=1e-4, rtol=1e-3)  # fmt: skip


def test_shares_of_noise_make_up_the_noise_of_a_sum():
    """``t`` clients' shares of variance ``std² / t`` each."""
    rules, shared = world(FedIT(LoRA(rank=40), "uniform"), head=False)
    t, std, z = 4, 3.0, []
    for round in range(30):
        own = [STREAM.child("client", k) for k in range(t)]
        nothing = {p: {"A": x["A"], "B": x["B"]} for p, x in shared.items()}
        turn = Turn(round, 0, 40)
        parts = [flat(protect(rules, shared, turn, nothing, 1.0, std / math.sqrt(t), s)) - flat(shared) for s in own]
        z.append(sum(parts) / std)
    z = torch.cat(z)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * len(z))


def test_the_stream_is_uniform_named_and_repeatable():
    u = STREAM.uniform(20000, "x")
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3 and float(u.min()) > 0 and float(u.max()) < 1
    assert torch.equal(u, STREAM.uniform(20000, "x")) and not torch.equal(u[:50], STREAM.uniform(50, "y"))
    assert torch.equal(u[:50], STREAM.uniform(50, "x")), "more draws do not move the first ones"
    assert not torch.equal(u[:50], STREAM.child("client", 1).uniform(50, "x"))
    assert key_of(None) != key_of(None) and key_of(3) == key_of(3) != key_of(4)
    assert "key" not in repr(STREAM), "a secret is not printed"
    sample = STREAM.sample(20000, 0.25, "rows")
    assert abs(len(sample) / 20000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20000)
