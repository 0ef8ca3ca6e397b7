"""Encoded uploads and deliveries: the server combines what arrives, clients begin at what it holds, the book is exact."""

from dataclasses import replace

import pytest
import torch

import fedlora
from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.comm.channel import Channel
from fedlora.engines.comm.compression import RESIDUAL, Compression
from fedlora.engines.in_process import InProcess
from fedlora.methods import METHODS
from fedlora.methods.fedit import FedIT
from fedlora.rounds import public_leaves
from fedlora.runs.plan.plan import build_meta_model, plan_bytes
from fedlora.types import Turn
from tests.fixtures.federation import HEAD, LORA, REFERENCE, WEIGHTS, config, same, settings

COARSE = ["compression.up=['top-k', 'int4']", "compression.down=['top-k', 'int8']", "compression.top_k=0.2"]
TURN = Turn(0, 0, 2, seed=7)


def rules():
    method = FedIT()
    return {"w": method}, {"w": method.adapter.init(24, 40, 0)}


def moved(shared, by=1.0, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return {"w": {leaf: x + by * torch.randn(x.shape, generator=draws) for leaf, x in shared["w"].items()}}


# ------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    "setting,said",
    [
        (["compression.up=int9"], "there is no codec 'int9'; did you mean 'int8'?"),
        (["compression.up=top-k"], "set compression.top_k"),
        (["compression.top_k=1.5"], "above 0 and below 1"),
        (["compression.up=['int8', 'top-k']", "compression.top_k=0.1"], "cannot follow"),
        (["compression.error_feedback=true"], "no error to add"),
        (["compression.up=int8", "flower.secure_aggregation=true"], "cannot be added"),
        (["compression.up=int8", "compression.error_feedback=true", "method.name=flora"], "other coordinates"),
        (["compression.down=int4", "method.name=flexlora"], "other coordinates"),
        (["compression.base_updates=int8"], "compression.base_updates"),
        (["compression.max_upload_mb=0"], "positive"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(setting, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        config(*setting)


def test_a_share_alone_thins_uploads():
    t = Compression(up="int8", top_k=0.1)
    assert [type(s).__name__ for s in t.upward.stages] == ["TopK", "Int8"] and t.downward is None
    t = Compression(up="int8", down=["top-k", "int8"], top_k=0.1)
    assert len(t.upward.stages) == 1 and len(t.downward.stages) == 2, "named where it is meant"


# ------------------------------------------------------------------------------------------------------ up
@pytest.mark.parametrize("up", ["bfloat16", "int8", "int4"])
def test_the_server_has_what_the_client_thinks_it_has(up):
    rule, shared = rules()
    t, sent = Compression(up=up, top_k=0.3, error_feedback=True), moved(shared)
    crosses, decoded, stays = t.encode_upload(rule, shared, {}, TURN, sent, {"w": {}})
    assert same(t.decode_upload(rule, shared, TURN, crosses), decoded)
    for leaf in "AB":
        assert not torch.equal(decoded["w"][leaf], sent["w"][leaf])
        assert torch.allclose(decoded["w"][leaf] + stays["w"][RESIDUAL + leaf], sent["w"][leaf], atol=1e-6)


def test_nothing_is_encoded_where_nothing_is_set():
    rule, shared = rules()
    sent, stays = moved(shared), {"w": {}}
    found = Compression(down="int8").encode_upload(rule, shared, {}, TURN, sent, stays)
    assert found.encoded is sent and found.decoded is sent and found.kept is stays
    assert Compression(up="int8").encode_shared(shared, sent, 1) is sent


def test_a_small_change_of_a_large_leaf_crosses_well():
    """The step of int8 is that of the change, not of the leaf."""
    rule, shared = rules()
    shared = {"w": {leaf: x + 100.0 for leaf, x in shared["w"].items()}}
    sent = moved(shared, by=1e-3)
    decoded = Compression(up="int8").encode_upload(rule, shared, {}, TURN, sent, {"w": {}}).decoded
    assert (decoded["w"]["A"] - sent["w"]["A"]).abs().max() < 1e-4


def test_what_is_owed_of_a_leaf_waits_until_that_leaf_is_sent_again():
    rule, shared = rules()
    t = Compression(up="int4", error_feedback=True)
    sent = moved(shared)
    first = t.encode_upload(rule, shared, {}, TURN, {"w": {"A": sent["w"]["A"]}}, {"w": {}}).kept
    second = t.encode_upload(rule, shared, first, replace(TURN, seed=8), {"w": {"B": sent["w"]["B"]}}, {"w": {}}).kept
    assert torch.equal(second["w"][RESIDUAL + "A"], first["w"][RESIDUAL + "A"]) and RESIDUAL + "B" in second["w"]


def test_a_client_that_pruned_itself_says_its_shape():
    method = METHODS.load("hetlora")()
    rule, shared = {"w": method}, {"w": method.adapter.init(24, 40, 0)}
    turn, t = Turn(0, 0, 8, seed=7), Compression(up="int8", error_feedback=True)
    sent = {"w": dict(method.adapter.leading(moved(shared)["w"], 3))}
    crosses, decoded, stays = t.encode_upload(rule, shared, {}, turn, sent, {"w": {}})
    assert crosses["w"]["A@shape"].tolist() == [3, 40] and not stays["w"]
    assert same(t.decode_upload(rule, shared, turn, crosses), decoded)
    for shape in ([9, 40], [0, 40], [-1, 40], [3], [3, 2**30]):
        with pytest.raises(ValueError, match="says a shape"):
            t.decode_upload(
                rule, shared, turn, {"w": {**crosses["w"], "A@shape": torch.tensor(shape, dtype=torch.int32)}}
            )


def test_an_upload_that_is_no_encoding_is_refused():
    rule, shared = rules()
    t = Compression(up="int8")
    crosses = t.encode_upload(rule, shared, {}, TURN, moved(shared), {"w": {}}).encoded
    for name, x in crosses["w"].items():
        with pytest.raises(ValueError, match=r"is|has"):
            t.decode_upload(rule, shared, TURN, {"w": {**crosses["w"], name: x[:-1]}})
    with pytest.raises(ValueError, match="does not have"):
        t.decode_upload(rule, shared, TURN, {"w": {"C@codes": torch.zeros(3)}})


# ---------------------------------------------------------------------------------------- error feedback
def descent(t, rounds=200, rate=0.05):
    """Four clients, each with a quadratic of its own; the mean of their minima is what they should agree on."""
    rule, shared = rules()
    goals = [moved(shared, seed=k + 1) for k in range(4)]
    best = {leaf: torch.stack([g["w"][leaf] for g in goals]).mean(0) for leaf in "AB"}
    kept = [{} for _ in goals]
    for number in range(rounds):
        mean = {leaf: torch.zeros_like(x) for leaf, x in public_leaves(shared["w"]).items()}
        for k, goal in enumerate(goals):
            sent = {"w": {leaf: x + rate * (goal["w"][leaf] - x) for leaf, x in public_leaves(shared["w"]).items()}}
            turn = Turn(number, k, 8, seed=100 * number + k)
            _, decoded, kept[k] = t.encode_upload(rule, shared, kept[k], turn, sent, {"w": {}})
            mean = {leaf: mean[leaf] + decoded["w"][leaf] / 4 for leaf in mean}
        shared = t.encode_shared(shared, {"w": {**shared["w"], **mean}}, number)
    return sum(float((shared["w"][leaf] - best[leaf]).square().sum()) for leaf in "AB") ** 0.5


def test_error_feedback_makes_up_for_what_top_k_cuts():
    """Only a tenth crosses: without feedback the clients' largest changes cancel, and the mean stays where it is."""
    plain = descent(Compression(top_k=0.1))
    fed = descent(Compression(top_k=0.1, error_feedback=True))  # each still pulls to its own goal: near, not at rest
    assert fed < plain / 4, (fed, plain)


def test_error_feedback_makes_up_for_what_int4_rounds():
    assert descent(Compression(up="int4", error_feedback=True)) < descent(Compression(up="int4")) / 2


def test_error_feedback_makes_up_for_what_the_server_cuts():
    cut = descent(Compression(down=["top-k", "int8"], top_k=0.1))
    fed = descent(Compression(down=["top-k", "int8"], top_k=0.1, error_feedback=True))
    assert descent(Compression()) < 1e-3
    assert cut > 1 and fed < 1e-2, (fed, cut)


# ---------------------------------------------------------------------------------------------------- down
@pytest.mark.parametrize("down,coarse", [("bfloat16", False), ("int8", False), ("int4", True)])
def test_what_is_served_is_what_clients_hold_whatever_they_missed(down, coarse):
    _, shared = rules()
    t, initial = Compression(down=down, error_feedback=True), shared
    channel = Channel(shared, frozenset(), t)
    holds = dict.fromkeys(range(3), shared)
    for number in range(6):
        for client in range(3):
            if number % (client + 1) == 0:  # client 1 is there every second round, client 2 every third
                delivery = channel.compute_delta(client, shared, BaseUpdateLog())
                got = t.decode_delivery(delivery.leaves, holds[client])
                holds[client] = {"w": {**holds[client]["w"], **got.get("w", {})}}
                channel.record_delivery(number, client, delivery)
                channel.confirm(client, delivery)
                assert all(torch.equal(holds[client]["w"][leaf], shared["w"][leaf]) for leaf in "AB")
        shared = t.encode_shared(shared, {"w": {**shared["w"], **moved(shared, seed=number)["w"]}}, number)
    delivery = channel.compute_delta(7, shared, BaseUpdateLog())  # who never was there
    got = t.decode_delivery(delivery.leaves, initial)
    assert all(torch.equal(got["w"][leaf], shared["w"][leaf]) for leaf in "AB")
    sizes = {c: [r.bytes for r in channel.ledger if r.client == c] for c in range(3)}
    numbers = 8 * (24 + 40)
    assert {r.numbers for r in channel.ledger} == {numbers}
    form = sum(torch.Size(s).numel() * d.itemsize for x in shared["w"] if x in "AB"
               for s, d in t.downward.form(tuple(shared["w"][x].shape)).values())  # fmt: skip
    assert set(sizes[0]) == {form}, "the version before is held: a difference does"
    assert set(sizes[2]) == ({4 * numbers} if coarse else {form}), "who was away is sent coarse leaves whole"


def test_a_channel_set_up_anew_never_sends_a_difference_to_what_nobody_holds():
    """After a crash the server has its tree, and nobody is known: version and held must not match by chance."""
    _, shared = rules()
    t, initial = Compression(down="int4"), shared
    for number in range(3):
        shared = t.encode_shared(shared, {"w": {**shared["w"], **moved(shared, seed=number)["w"]}}, number)
    channel = Channel(initial, frozenset(), t)
    delivery = channel.compute_delta(0, shared, BaseUpdateLog())
    assert set(delivery.leaves["w"]) == {"A", "B"}, "whole"


# -------------------------------------------------------------------------------------------------- whole runs
def test_bytes_of_a_run(reference):
    """int8 is a quarter and four bytes a scale; bfloat16 is half; top-k with bits an eighth of a byte a number."""
    plain = reference("fedit").summary["bytes"]
    assert plain["up"] == {"adapter": 12 * LORA, "head": 12 * HEAD}
    few = ("training.local_steps=1", "evaluation={every = 4, measure = false}")
    found = fedlora.run(config(*REFERENCE, *few, "compression.up=int8", "compression.down=bfloat16")).summary["bytes"]
    scales = WEIGHTS * 4 * 4  # weights, ranks of A and B, bytes
    assert found["up"]["adapter"] == 12 * (LORA // 4 + scales)
    assert found["up"]["head"] == 12 * (HEAD // 4 + 10 * 4 + 4)
    assert found["down"] == {kind: size // 2 for kind, size in plain["down"].items()}


@pytest.mark.parametrize("name", METHODS.names())
def test_the_plan_is_exact(name):
    rough = [*COARSE, "compression.error_feedback=true"]
    if not getattr(METHODS.load(name), "keeps_frame", True):
        rough = [COARSE[0], COARSE[2], "compression.down=int8"]
    made = config(*settings(name), *rough, "compression.base_updates=bfloat16", "rounds=4",
                  "clients.per_round=2", "evaluation.every=4", "evaluation.measure=false", "training.local_steps=1")  # fmt: skip
    plan = plan_bytes(build_meta_model(made))
    assert plan["exact"] and plan["run"] == fedlora.run(made).summary["bytes"]


def test_base_updates_are_rounded_before_anybody_base_updates_them():
    own = ("method.name=fedex-lora", "rounds=3", "clients.per_round=2", "evaluation.every=3")
    rounds = list(InProcess().run(config(*own, "compression.base_updates=bfloat16").federation()))
    entry = rounds[-1].base_updates.entries[-1]
    assert all(torch.equal(x, x.bfloat16().float()) for several in entry.values() for g in several for x in g)
    plain = fedlora.run(config(*own)).records
    assert rounds[1].record["bytes"]["down"]["base_update"] < plain[1]["bytes"]["down"]["base_update"]


def test_other_draws_in_every_round_and_for_every_client():
    rule, shared = rules()
    t, sent = Compression(up="int8"), moved(shared)
    found = [
        t.encode_upload(rule, shared, {}, Turn(0, k, 8, seed=k), sent, {"w": {}}).decoded["w"]["A"] for k in range(3)
    ]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
