"""Every upload is looked at before it counts: what is refused, what that leaves behind, and what honest clients notice."""

import json
import re

import pytest
import torch

import fedlora
from fedlora.adapters import Dense, LoRA, MultiHead
from fedlora.files import load_tree
from fedlora.methods.fedit import FedIT
from fedlora.methods.flexlora import FlexLoRA
from fedlora.methods.hetlora import HetLoRA
from fedlora.methods.ravan import Ravan
from fedlora.rounds import server_turn
from fedlora.runs.config import build
from fedlora.schema import apply_overrides
from fedlora.security.validation import UploadScreen, Validation, excluded_clients
from fedlora.security.validation.expected import CheckedUpload
from fedlora.security.validation.update_norms import ServedLeaves, measure_movement, update_norm
from fedlora.types import Turn
from tests.fixtures.federation import TABLE, config, same
from tests.fixtures.uploads import R, dense, turned, world

METHOD = FedIT(LoRA(R, 6.0))
SMALL = {key: value for key, value in TABLE.items() if key != "training"}


def through(screen, uploads, steps=lambda upload: 1):
    """The uploads that a round's screen lets in."""
    return screen.compare([found for u in uploads if (found := screen.check(u)) is not None], steps)


def changed(upload, change):
    tree = {part: dict(layer) for part, layer in upload.tree.items()}
    change(tree)
    return upload._replace(tree=tree)


def put(part, leaf, make):
    def change(tree):
        tree[part][leaf] = make(tree[part][leaf])

    return change


def one(value):
    def make(x):
        x = x.clone()
        x[0, 0] = value
        return x

    return make


BAD = {
    "a part of no model": (
        lambda t: t.update(nobody={"A": torch.ones(2)}),
        "part 'nobody', which the model does not have",
    ),
    "a leaf too many": (lambda t: t["w"].update(C=torch.ones(2)), "it sent the leaf 'C'"),
    "a leaf missing": (lambda t: t["w"].pop("B"), "it did not send the leaf 'B' of 'w'"),
    "a part missing": (lambda t: t.pop("head"), "it did not send the leaf 'weight' of 'head'"),
    "another shape": (put("w", "A", lambda x: x[:1]), r"with shape \(1, 7\), not \(3, 7\)"),
    "another rank": (lambda t: t["w"].update(A=t["w"]["A"][:2], B=t["w"]["B"][:, :2]), r"shape \(2, 7\), not \(3, 7\)"),
    "whole numbers": (put("w", "A", lambda x: x.int()), "no plain ones"),
    "complex numbers": (put("w", "A", lambda x: x.to(torch.complex64)), "no plain ones"),
    "NaN": (put("v", "B", one(torch.nan)), "'B' of 'v' with values that are no finite numbers"),
    "infinity": (put("head", "weight", one(-torch.inf)), "'weight' of 'head' with values that are no finite numbers"),
    "beyond all bounds": (put("w", "A", one(1e6)), "no finite numbers"),
    "beyond float32's squares": (put("w", "A", one(1e30)), "no finite numbers"),
    "an update too large": (
        put("head", "weight", lambda x: 1 + 600 * (x - 1)),
        "times the round's median, above validation.norm_limit",
    ),
    "another's update": (None, "it sent what client 0 had sent before"),
    "a rescaled pair": (lambda t: t.update(_pair(t, 100.0)), "the pair is rescaled or turned"),
    "one rescaled the other way": (lambda t: t.update(_pair(t, 0.01)), "the pair is rescaled or turned"),
    "one weight's pair": (lambda t: t.update(w=_pair(t, 1e3)["w"]), "the pair is rescaled or turned"),
}


def _pair(tree, c):
    return {p: {"A": tree[p]["A"] / c, "B": tree[p]["B"] * c} for p in ("w", "v")}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_upload_is_named_and_leaves_no_trace(fault):
    change, why = BAD[fault]
    rules, shared, uploads = world(METHOD, K=6, head=True)
    conduct = {}
    if change is None:  # the round before: client 0 sent what client 3 sends now
        screen = UploadScreen(Validation(), rules, shared, conduct)
        through(screen, uploads)
        screen.record_conduct()
        uploads = [changed(u, put("head", "weight", lambda x: x + 0.01)) for u in uploads]
        uploads[3] = uploads[3]._replace(tree=world(METHOD, K=6, head=True)[2][0].tree)
    else:
        uploads[3] = changed(uploads[3], change)
    screen = UploadScreen(Validation(), rules, shared, json.loads(json.dumps(conduct)))
    good = through(screen, uploads)
    assert [u.turn.client for u in good] == [0, 1, 2, 4, 5]
    assert list(screen.rejected) == [3]
    assert re.search(why, screen.rejected[3].reason), screen.rejected[3].reason
    alone = server_turn(rules, shared, [u for u in uploads if u.turn.client != 3])
    assert same(server_turn(rules, shared, good).shared, alone.shared), "bit for bit"


def test_honest_uploads_pass_as_the_very_same_tensors():
    rules, shared, uploads = world(METHOD, K=6, head=True)
    good = through(UploadScreen(Validation(), rules, shared, {}), uploads)
    assert all(a.tree[p][leaf] is x for a, b in zip(good, uploads) for p in b.tree for leaf, x in b.tree[p].items())
    assert [u.examples for u in good] == [u.examples for u in uploads]


def test_who_was_to_do_more_may_move_farther():
    rules, shared, uploads = world(METHOD, K=6)
    uploads[3] = changed(
        uploads[3], lambda t: [t[p].update(B=shared[p]["B"] + 30 * (t[p]["B"] - shared[p]["B"])) for p in t]
    )
    assert len(through(UploadScreen(Validation(), rules, shared, {}), uploads)) == 5
    assert (
        len(through(UploadScreen(Validation(), rules, shared, {}), uploads, lambda u: 40 if u.turn.client == 3 else 1))
        == 6
    )


def test_a_client_that_prunes_its_rank_is_sound():
    adapter = LoRA(R, 6.0)
    rules, shared, uploads = world(HetLoRA(adapter, decay=0.9), K=4)
    pruned = {p: dict(adapter.leading(layer, 2)) for p, layer in uploads[1].tree.items()}
    uploads[1] = uploads[1]._replace(tree=pruned)
    assert len(through(UploadScreen(Validation(), rules, shared, {}), uploads)) == 4


def test_turned_pairs_are_stopped_only_where_they_wreck_the_mean():
    """Clients that moved little are far from a turned pair; where all moved far, a turned one is no farther."""
    rules, shared, uploads = world(METHOD, K=6)
    T = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(1)))[0]
    for by, passed in ((0.05, 5), (4.0, 6)):
        some = [
            u._replace(
                tree={p: {k: shared[p][k] + by * (x - shared[p][k]) for k, x in u.tree[p].items()} for p in u.tree}
            )
            for u in uploads
        ]
        assert len(through(UploadScreen(Validation(), rules, shared, {}), [*some[:5], turned(some[5], T)])) == passed


def test_claims_are_capped():
    assert Validation().cap_examples([1, 2, 10**12]) == [1, 2, 200]
    assert Validation(most_examples=5).cap_examples([1, 9]) == [1, 5]
    rules, shared, uploads = world(METHOD, K=4)
    uploads[3] = uploads[3]._replace(examples=10**15)
    good = through(UploadScreen(Validation(most_examples=6), rules, shared, {}), uploads)
    assert [u.examples for u in good] == [1, 2, 3, 6]


def test_strikes_count_rounds_and_then_a_client_is_barred():
    rules, shared, uploads = world(METHOD, K=5)
    uploads[2] = changed(uploads[2], put("w", "A", one(torch.nan)))
    conduct = {}
    for number in range(1, 4):
        screen = UploadScreen(Validation(strikes=3), rules, shared, conduct)
        through(screen, [uploads[2], *uploads])  # it tried twice: one strike a round
        screen.record_conduct()
        conduct = json.loads(json.dumps(conduct))
        assert conduct["strikes"] == {"2": number}
        assert excluded_clients(Validation(strikes=3), conduct) == ({2} if number == 3 else set())
    assert excluded_clients(Validation(strikes=0), conduct) == set()


NAN = "attack={name='nan', clients=[1], start=2}"


def test_a_run_quarantines_says_so_and_keeps_the_file(tmp_path):
    events = []
    out = tmp_path / "run"
    settings = ("rounds=5", NAN, "validation.strikes=2", "evaluation.every=5", "validation.keep_files=1")
    result = fedlora.run(config(*settings), out, events.append)
    assert [r["cohort"] for r in result.records] == [[0, 1, 2], [0, 2], [0, 2], [0, 2], [0, 2]]
    assert [set(r.get("quarantined", ())) for r in result.records] == [set(), {1}, {1}, set(), set()]
    assert result.records[3]["absent"] == {1: "left out: it was quarantined in 2 rounds"}
    told = [(e.round, e.client) for e in events if e.kind == "quarantined"]
    assert told == [(1, 1), (2, 1)] and "no finite numbers" in next(e.text for e in events if e.kind == "quarantined")
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["quarantined"]["1"]) == {"2", "3"}
    assert [path.name for path in (out / "quarantine").iterdir()] == ["2-1.safetensors"], (
        "one file, as keep_files has it"
    )
    kept = load_tree(out / "quarantine" / "2-1.safetensors")
    assert all(torch.isnan(x).sum() == 1 for layer in kept.values() for x in layer.values())
    assert all(torch.isfinite(x).all() for layer in result.shared.values() for x in layer.values())


def test_a_turn_that_did_not_count_leaves_no_trace_at_the_client():
    settings = ("method.name=fedsa-lora", NAN, "evaluation.every=9")
    before, after = (fedlora.run(config(*settings, f"rounds={n}")).kept[1] for n in (1, 3))
    assert same(before, after)


def test_uploads_on_disk_are_judged_alike():
    settings = ("rounds=2", "attack={name='scaling', clients=[1], scale=100.0}", "evaluation.measure=false")
    there, here = (fedlora.run(config(*settings, f"engine.offload={offload}")) for offload in ("true", "false"))
    assert same(there.shared, here.shared)
    assert there.summary["quarantined"] == here.summary["quarantined"]
    assert "norm" in here.summary["quarantined"]["1"]["1"]


def test_norms_are_those_of_the_update_written_out():
    rules, shared, uploads = world(METHOD, K=3, head=True)
    screen = UploadScreen(Validation(), rules, shared, {})
    through(screen, uploads)
    for k, upload in enumerate(uploads):
        found = update_norm(rules, screen.starts[k].start, screen.starts[k].products, upload.tree, screen.movements[k])
        assert found == pytest.approx(float(dense(rules, shared, upload).norm()), rel=1e-4)
        for leaf, square in zip("AB", screen.movements[k].sides["w"]):
            assert square == pytest.approx(float((upload.tree["w"][leaf] - shared["w"][leaf]).square().sum()), rel=1e-4)
    assert "head" not in screen.movements[0].sides


def test_distances_are_those_of_leaves_of_all_shapes_and_types():
    torch.manual_seed(3)
    head = FedIT(Dense(frozenset({"weight", "scale"})))
    rules, pair = {"w": METHOD, "v": METHOD, "head": head}, {"A": torch.randn(R, 7), "B": torch.randn(9, R)}
    last = {"scale": torch.tensor(2.0), "weight": torch.randn(4, 5).bfloat16()}
    tree = {"w": pair, "v": {"A": torch.randn(R, 9), "B": torch.randn(R, R)}, "head": last}
    start = {part: {leaf: torch.ones_like(x) for leaf, x in layer.items()} for part, layer in tree.items()}
    found = CheckedUpload(tree, start, frozenset())
    away, origin = measure_movement(found, ServedLeaves(rules, found)), ServedLeaves(rules, found)
    square = {p: {leaf: float((x.double() - 1).square().sum()) for leaf, x in tree[p].items()} for p in tree}
    assert away.leaves == pytest.approx({part: sum(layer.values()) for part, layer in square.items()}, rel=1e-5)
    assert away.sides == {p: pytest.approx((square[p]["A"], square[p]["B"]), rel=1e-5) for p in ("w", "v")}
    assert measure_movement(found, origin) == away, "measuring leaves no trace"
    for part, layer in tree.items():
        for leaf, x in layer.items():
            other = found._replace(tree={**tree, part: {**layer, leaf: x + 1}})
            assert measure_movement(other, origin).digest != away.digest
    assert measure_movement(found._replace(tree=start), origin).digest == ""


def test_uploads_that_differ_in_one_number_are_no_copies_of_each_other():
    torch.manual_seed(4)
    start = {"w": {"A": torch.randn(R, 700), "B": torch.zeros(9, R)}}
    origin, seen = ServedLeaves({"w": METHOD}, CheckedUpload(start, start, frozenset())), set[str]()
    for place, x in enumerate(torch.randn(R * 700)):  # each changes another number, as under top-k
        A = start["w"]["A"].clone()
        A.view(-1)[place] = x
        seen.add(measure_movement(CheckedUpload({"w": {**start["w"], "A": A}}, start, frozenset()), origin).digest)
    assert len(seen) == R * 700


def test_products_are_looked_at_only_where_somebody_moved_far(monkeypatch):
    rules, shared, uploads = world(METHOD, K=5)
    monkeypatch.setattr("fedlora.security.validation.screen.update_norm", None)  # calling it would fail
    assert len(through(UploadScreen(Validation(), rules, shared, {}), uploads)) == 5
    uploads[1] = changed(uploads[1], lambda t: t["w"].update(B=shared["w"]["B"] + 5 * (t["w"]["B"] - shared["w"]["B"])))
    with pytest.raises(TypeError):
        through(UploadScreen(Validation(), rules, shared, {}), uploads)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_honest_clients_that_differ_much_are_let_in(optimizer):
    """Few labels each, rows and steps that differ tenfold: what honest federations look like."""
    unequal = "clients={count=6, partition={name='dirichlet', alpha=0.1}}"
    rate = "training.learning_rate=0.05" if optimizer == "sgd" else "training.learning_rate=0.005"
    how = (f"training={{local_epochs=1, batch_size=4, optimizer='{optimizer}'}}", rate)
    result = fedlora.run(
        build(apply_overrides(SMALL, [unequal, *how, "rounds=4", "evaluation={every=9, measure=false}"]))
    )
    assert "quarantined" not in result.summary


def test_what_is_expected_is_made_once_for_turns_that_are_alike(monkeypatch):
    from fedlora.security.validation import expected

    asked, plain = [], expected.build_upload_spec
    monkeypatch.setattr(expected, "build_upload_spec", lambda *about: asked.append(about) or plain(*about))
    rules, shared, uploads = world(METHOD, K=6, head=True)
    assert len(through(UploadScreen(Validation(), rules, shared, {}), uploads)) == 6
    assert len(asked) == 1, "FedIT's hooks read nothing of a turn"
    for score, times in (("random", 6), ("weight", 6)):
        ravan = {"w": Ravan(MultiHead(heads=4, head_rank=2), score=score)}
        wanted = expected.UploadSpecs(ravan, {"w": ravan["w"].adapter.init(9, 9, 0)})
        turns = [Turn(0, k, 2, seed=k) for k in range(6)]
        asked.clear()
        found = [wanted.of(turn) for turn in turns]
        assert len(asked) == times, "which heads a client trains goes by its seed"
        assert [f.forms for f in found] == [plain(ravan, wanted.shared, turn).forms for turn in turns]
        asked.clear()
        assert wanted.of(Turn(0, 0, 4, 0)) is wanted.of(Turn(0, 1, 4, 1)) and len(asked) == 1, "all heads: no draw"
        assert wanted.of(Turn(0, 0, 4, 0)).sent["w"].keys() == {"H0", "H1", "H2", "H3"}
    flex = expected.UploadSpecs({"w": FlexLoRA(LoRA(R, 6.0))}, {"w": shared["w"]})
    ranks = [flex.of(Turn(0, k, rank, k)).forms["w"]["A"][0][0] for k, rank in enumerate((3, 1, 3, 2, 1))]
    assert ranks == [3, 1, 3, 2, 1], "a turn of another rank has an answer of its own"
