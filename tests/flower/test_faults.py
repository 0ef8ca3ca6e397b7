"""Parties that err, are late, lie, go and come back: the round goes on with the others, and says who was left out."""

import re
import stat
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

import fedlora
from fedlora.engines.network_settings import Network
from fedlora.flower import node_registry
from fedlora.flower import wire as records
from fedlora.flower.client import digest_start
from fedlora.flower.client_store import ClientStore
from fedlora.flower.node_registry import GONE, TooFewError
from fedlora.rounds import Received, server_turn
from fedlora.runs.build import fingerprint
from fedlora.types import Factors
from tests.fixtures.federation import REFERENCE, WIDTH
from tests.fixtures.flower import QUICK, TRAIN_ONLY, World, agree, config, overrides, same

IMPATIENT = replace(QUICK, round_timeout=0.05)
SHORT = (TRAIN_ONLY, "training.local_steps=1")


def from_node(message, client):
    return message.metadata.src_node_id == 10 + client


def in_round(message, number):
    """Whether this reply is to the training of round ``number`` (from 1)."""
    kind = message.metadata.message_type
    return kind == "train" and message.metadata.group_id == str(number)


def changed(change, client=1, number=2):
    """A postman who lets ``change`` rewrite one client's upload of one round."""

    def post(message):
        if message.metadata.src_node_id == 10 + client and in_round(message, number) and message.has_content():
            return change(message)
        return message

    return post


def with_tree(message, change):
    tree = {part: dict(layer) for part, layer in records.record_to_tree(message.content["leaves"]).items()}
    change(tree)
    message.content["leaves"] = records.tree_to_record(tree)
    return message


def adapted(tree):
    return next(part for part in sorted(tree) if "A" in tree[part])


def nan(tree):
    part = next(iter(tree))
    leaf = next(iter(tree[part]))
    tree[part][leaf][0] = torch.nan


def other_shape(tree):
    part = adapted(tree)
    tree[part]["A"] = tree[part]["A"][:1]  # (1, n): numpy would broadcast it


def unknown_part(tree):
    tree["nobody"] = {"A": torch.ones(2, 2)}


def frozen_leaf(tree):
    tree[next(iter(tree))]["frozen"] = torch.ones(2, 2)


def whole_numbers(tree):
    part = adapted(tree)
    tree[part]["A"] = tree[part]["A"].to(torch.int32)


def part_missing(tree):
    del tree[next(iter(tree))]


def metrics(**found):
    def change(message):
        message.content["metrics"] = MetricRecord({**message.content["metrics"], **found})
        return message

    return change


def without(name):
    def change(message):
        del message.content[name]
        return message

    return change


def garbage(message):
    message.content["leaves"] = ArrayRecord({"leaves": Array(torch.arange(9, dtype=torch.uint8).numpy())})  # npy
    return message


def error(message):
    sent = Message(Error(2, "its disk is full"), reply_to=_asked(message))
    sent.metadata.__dict__.update(message.metadata.__dict__)
    return sent


def _asked(reply):
    content = Message(RecordDict(), 1, reply.metadata.message_type)
    content.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return content


def other_holding(message):
    message.content["holds"] = ConfigRecord({"holds": "0" * 32})
    return message


def as_float8(tree):
    part = adapted(tree)
    tree[part]["A"] = tree[part]["A"].to(torch.float8_e4m3fn)


def huge(tree):
    part = adapted(tree)
    tree[part]["A"] = torch.full_like(tree[part]["A"], 3e38)


def _replaced(message, name, record):
    del message.content[name]
    message.content[name] = record
    return message


def raw(content):
    def change(message):
        array = Array(dtype="uint8", shape=(len(content),), stype="safetensors", data=content)
        message.content["leaves"] = ArrayRecord({"leaves": array})
        return message

    return change


def as_config(message):
    del message.content["leaves"]
    message.content["leaves"] = ConfigRecord({"leaves": b"x"})
    return message


FAULTS = {
    "float8": (lambda m: with_tree(m, as_float8), "no plain ones"),
    "huge": (lambda m: with_tree(m, huge), "no finite numbers"),
    "zip": (raw(b"PK\x03\x04" + bytes(40)), "no tree of leaves"),
    "a header of 2^60 bytes": (raw((2**60).to_bytes(8, "little") + b"{}"), "no tree of leaves"),
    "leaves of another kind": (as_config, "no tree of leaves"),
    "rows as a float": (metrics(examples=3.0), "claims 3.0 training rows"),
    "metrics of another kind": (lambda m: _replaced(m, "metrics", ConfigRecord({"round": "x"})), "answered for round"),
    "NaN": (lambda m: with_tree(m, nan), "no finite numbers"),
    "other shapes": (lambda m: with_tree(m, other_shape), rf"with shape \(1, {WIDTH}\), not \(2, {WIDTH}\)"),
    "an unknown part": (lambda m: with_tree(m, unknown_part), "which the model does not have"),
    "an unknown leaf": (lambda m: with_tree(m, frozen_leaf), "it sent the leaf 'frozen'"),
    "whole numbers": (lambda m: with_tree(m, whole_numbers), "no finite numbers"),
    "a part missing": (lambda m: with_tree(m, part_missing), "it did not send the leaf"),
    "another round": (metrics(round=0), "answered for round 0, not {round}"),
    "no rows": (metrics(examples=0), "claims 0 training rows"),
    "fewer than no rows": (metrics(examples=-5), "claims -5 training rows"),
    "loss NaN": (metrics(loss=float("nan")), "its loss is nan"),
    "no arrays": (without("leaves"), "leaves"),
    "no metrics": (without("metrics"), "metrics"),
    "garbage": (garbage, "no tree of leaves"),
    "an error": (error, "its disk is full"),
    "another holding": (other_holding, "does not hold what it was sent"),
    "nothing": (lambda m: None, "no answer within 0.05 seconds"),
}


def test_a_bad_upload_is_left_out_by_name_and_the_others_are_weighted_anew(tmp_path):
    """A sound round, then a fault in each: of clients 1 and 2 in turn, so that each is back in the round after it."""
    faults = dict(enumerate(FAULTS, start=1))  # round -> fault
    faulty = {number: 1 + number % 2 for number in faults}  # round -> client

    def post(message):
        client = message.metadata.src_node_id - 10
        number = int(message.metadata.group_id) - 1 if message.metadata.message_type == "train" else 0
        if message.has_content() and faulty.get(number) == client:
            return FAULTS[faults[number]][0](message)
        return message

    settings = [
        "evaluation.measure=false",
        "training.local_steps=1",
        f"rounds={len(FAULTS) + 2}",
        "validation.strikes=0",
    ]
    world = World(tmp_path, *settings, network=IMPATIENT, post=post)
    seen = []
    world.server.observe = lambda rules, shared, uploads: seen.append((shared, list(uploads))) or {}
    rounds = world.run()
    for done, (before, uploads) in zip(rounds, seen, strict=True):
        fault, client = faults.get(done.number), faulty.get(done.number)
        left = {**done.record.get("absent", {}), **done.record.get("quarantined", {})}
        assert done.record["cohort"] == [k for k in range(3) if k != client], fault
        assert set(left) == ({client} if fault else set()), fault
        assert "unscored" not in done.record, f"{fault}: whoever was left out is scored all the same"
        if fault:
            assert re.search(FAULTS[fault][1].replace("{round}", str(done.number)), left[client]), (fault, left)
        alone = server_turn(world.federation.rules, before, [Received(u.turn, u.examples, u.tree) for u in uploads])
        assert same(done.shared, alone.shared), fault
    told = [e for e in world.events if e.kind in ("absent", "quarantined")]
    assert [(e.round, e.client) for e in told] == list(faulty.items())


@pytest.mark.parametrize("name", ["fedsa-lora", "fedit"])
def test_a_turn_that_did_not_count_leaves_no_trace_at_the_party(name, tmp_path):
    """Its upload of round 2 is lost: what it keeps is what it kept, and round 3 starts there."""
    world = World(tmp_path, *overrides(name), *SHORT, "rounds=2", network=IMPATIENT, post=changed(lambda m: None))
    before = None
    for done in world.server.run(world.federation):
        if done.number == 0:
            before = ClientStore(tmp_path / "run").load(1).resolve_pending(0).kept
    assert same(world.kept(1), before)
    assert any(before.values()) == (name == "fedsa-lora")


def test_below_the_minimum_the_round_waits_says_so_and_goes_on_when_a_client_is_back(tmp_path, reference):
    world = World(tmp_path, *REFERENCE, network=replace(QUICK, min_clients=3, join_timeout=0.05))
    looks = []

    def watch(event):
        world.events.append(event)
        if event.kind == "round" and event.round == 0:
            world.grid.leave(11)
        if event.kind == "waiting":
            looks.append(event.text)
            world.grid.join(31, {"client": 1})  # its SuperNode comes back under another id

    world.server.watch = watch
    rounds = world.run()
    assert looks == ["2 of at least 3 clients have answered; waiting for more"]
    assert [r.record["cohort"] for r in rounds] == [[0, 1, 2]] * 4
    assert same(rounds[-1].shared, reference("fedit").shared), "its state was on its disk"


@pytest.mark.parametrize("name", ["fedsa-lora", "fedex-lora", "feddpa", "hetlora"])
def test_private_state_and_base_updates_survive_a_restart_of_every_node(name, tmp_path, reference):
    pruning = ["method.decay=0.9"] if name == "hetlora" else []  # then it keeps a rank
    world = World(tmp_path, *overrides(name), *pruning, *REFERENCE)

    def watch(event):
        if event.kind == "round":
            for k in range(3):  # nothing but the disk is left: new ids, new contexts, new base
                world.grid.leave(10 + k + 10 * event.round)
                world.grid.join(20 + k + 10 * event.round, {"client": k})
            world.base = type(world.base)(world.config.federation())

    world.server.watch = watch
    rounds = world.run()
    here = fedlora.run(world.config) if pruning else reference(name)
    assert same(rounds[-1].shared, here.shared)
    assert agree(rounds[-1].record["clients"], here.records[-1]["clients"])


@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
def test_a_node_that_was_away_catches_up_with_every_fold(name, tmp_path):
    world = World(tmp_path, f"method.name={name}", *SHORT, "rounds=5", network=replace(QUICK, join_timeout=0.02))

    def watch(event):
        if event.kind == "round" and event.round == 0:
            world.grid.leave(11)
        if event.kind == "round" and event.round == 2:
            world.grid.join(11, {"client": 1})

    world.server.watch = watch
    rounds = world.run()
    assert [r.record["cohort"] for r in rounds] == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert rounds[1].record["absent"] == {1: "its node is not connected"}
    store = ClientStore(tmp_path / "run")
    base_updates = [store.load(client).base_updates for client in range(3)]
    assert base_updates[0] == base_updates[1] == base_updates[2] and len(base_updates[0]) == 5
    world.base.apply_base_updates(base_updates[1], store)
    for part, mine in world.federation.model.parts.items():
        if hasattr(mine.module, "base"):
            theirs = world.base.federation.model.parts[part].module.base.weight
            assert torch.equal(mine.module.base.weight, theirs)


def test_a_node_that_joins_late_is_taken_in(tmp_path):
    world = World(tmp_path, *SHORT, "rounds=3", network=replace(QUICK, join_timeout=0.02))
    world.grid.leave(12)

    def watch(event):
        if event.kind == "round" and event.round == 0:
            world.grid.join(12, {"client": 2})

    world.server.watch = watch
    assert [r.record["cohort"] for r in world.run()] == [[0, 1], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("answers", [True, False])
def test_the_first_round_waits_for_a_party_that_is_still_loading(answers, tmp_path, monkeypatch):
    """Longer than for one that is not connected, since a large model takes its time; and not for ever."""
    monkeypatch.setattr(node_registry, "PATIENCE", 600.0 if answers else 0.2)
    hellos, looks = [], []

    def post(message):
        if message.metadata.message_type == "query" and message.metadata.src_node_id == 12:
            hellos.append(message)
            return None
        return message

    world = World(tmp_path, *SHORT, "rounds=1", network=replace(QUICK, join_timeout=0.02), post=post)
    pull = world.grid.pull_messages

    def slow(ids):
        looks.append(ids)
        late = [m for m in hellos if answers and len(looks) > 100 and m.metadata.reply_to_message_id in ids]
        hellos[:] = [m for m in hellos if m not in late]
        return [*pull(ids), *late]

    world.grid.pull_messages = slow
    assert world.run()[0].record["cohort"] == ([0, 1, 2] if answers else [0, 1])
    (told,) = [e.text for e in world.events if e.kind == "node" and "node 12" in e.text]
    assert told.startswith("node 12 is connected and still loading its model and data; the first round waits")


def test_a_disk_that_was_lost_is_filled_again_within_the_round(tmp_path, reference):
    world = World(tmp_path, "method.name=fedex-lora", *REFERENCE)

    def watch(event):
        if event.kind == "round" and event.round == 1:
            (tmp_path / "run" / "clients" / "1.safetensors").unlink()

    world.server.watch = watch
    rounds = world.run()
    assert "absent" not in rounds[2].record
    assert same(rounds[-1].shared, reference("fedex-lora").shared), "it holds nothing of its own, so nothing is lost"


def test_a_stand_in_is_asked_where_a_sampled_client_is_away(tmp_path):
    world = World(tmp_path, *SHORT, "rounds=4", "clients.per_round=2", network=replace(QUICK, join_timeout=0.02))
    world.grid.leave(11)
    for done in world.run():
        assert done.record["cohort"] == [0, 2]
        named = 1 in world.federation.clients.cohort(done.number, 0)
        assert done.record.get("absent", {}) == ({1: "its node is not connected"} if named else {})


def test_who_is_not_connected_is_named_among_the_unscored_and_said_once_a_round(tmp_path):
    """Also where it is drawn to no turn; a mean over fewer clients is never without a reason."""
    world = World(tmp_path, "training.local_steps=1", "evaluation.measure=false", "rounds=3", "clients.per_round=2")
    world.server.watch = lambda event: (
        world.events.append(event),
        world.grid.leave(11) if (event.kind, event.round) == ("round", 0) else None,
    )
    first, *others = world.run()
    assert "unscored" not in first.record and None not in first.record["clients"]["each"]
    for done in others:
        assert done.record["unscored"] == {1: GONE} and done.record["clients"]["each"][1] is None
    assert [(e.round, e.text) for e in world.events if e.kind == "absent"] == [(1, GONE), (2, GONE)]


def test_a_node_with_a_wrong_number_is_left_out(tmp_path):
    world = World(tmp_path, *SHORT, "rounds=1")
    wrong = {
        40: (1, "client 1, which node 11 is already"),
        41: (7, "client 7, and clients are numbered 0 to 2"),
        42: (-1, "client -1, and clients are numbered 0 to 2"),
    }
    for node, (client, _) in wrong.items():
        world.grid.join(node, {"client": client})
    [done] = world.run()
    assert done.record["cohort"] == [0, 1, 2]
    told = [e.text for e in world.events if e.kind == "node"]
    for node, (_, why) in wrong.items():
        assert any(f"node {node} is left out" in text and why in text for text in told), told


def test_a_node_with_another_pretrained_model_is_left_out(tmp_path):
    world = World(tmp_path, "rounds=1", network=replace(QUICK, min_clients=1))
    other = config("seed=5").federation()
    assert digest_start(other) != digest_start(world.federation)
    weight = next(p for p in other.model.network.parameters() if p.ndim == 2)
    before = digest_start(other)
    weight.data[0, 0] += 1
    assert digest_start(other) != before, "the pretrained weights are part of it"
    world.base = type(world.base)(other)
    world.grid.leave(11)
    world.grid.leave(12)
    world.server.network = replace(QUICK, join_timeout=0.02)
    world.server.registry = None
    at = world.server.begin(world.federation)
    world.server.at = at
    world.server._registry.wait(0.02)
    assert not world.server._registry.connected_clients()
    assert "does not make the same start" in world.events[-1].text


def test_what_a_party_keeps_is_for_its_owner_only(tmp_path):
    World(tmp_path, "method.name=fedsa-lora", "rounds=1").run()
    for path in (tmp_path / "run").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64]
)
def test_any_dtype_crosses(dtype):
    tree = {"a.b": {"A": torch.arange(6).reshape(2, 3).to(dtype), "s": torch.tensor(3).to(dtype)}}
    back = records.record_to_tree(records.tree_to_record(tree))
    assert same(back, tree) and back["a.b"]["A"].dtype == dtype


def test_base_updates_cross_in_order():
    draws = [{"x.y": (Factors(torch.randn(3, i + 1), torch.randn(i + 1, 2)),)} for i in range(12)]
    back = records.record_to_base_updates(records.base_updates_to_record(draws))
    assert all(torch.equal(a["x.y"][0].U, b["x.y"][0].U) for a, b in zip(back, draws, strict=True))


@pytest.mark.parametrize("setting", ["min_clients=0", "round_timeout=0.0", "poll=-1.0", "join_timeout=0.0"])
def test_wrong_settings_are_said(setting):
    with pytest.raises(fedlora.ConfigError, match=rf"flower\.{setting.split('=')[0]}"):
        config(f"flower.{setting}")
    assert Network().min_clients == 2


def lower_rank_of_one_side(tree):
    tree[adapted(tree)]["A"] = tree[adapted(tree)]["A"][:1]


def without_b(tree):
    del tree[adapted(tree)]["B"]


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "flora", "svd"])
def test_methods_with_unequal_ranks_are_spared_what_does_not_fit_together(name, tmp_path):
    changes = {2: lower_rank_of_one_side, 3: without_b, 4: part_missing, 5: huge}  # round, from 1 -> what happens in it

    def post(message):
        client = message.metadata.src_node_id - 10
        number = int(message.metadata.group_id) if message.metadata.message_type == "train" else 0
        if message.has_content() and number in changes and client == 1 + number % 2:
            return with_tree(message, changes[number])
        return message

    settings = [f"method.name={name}", "adapter={name = 'lora', rank = 4, alpha = 8}", "clients.ranks=[2, 4, 4]"]
    world = World(tmp_path, *settings, *SHORT, "rounds=6", post=post)
    cohorts = [r.record["cohort"] for r in world.run()]
    assert cohorts == [[0, 1, 2], [0, 2], [0, 1], [0, 2], [0, 1], [0, 1, 2]], [e.text for e in world.events]


def test_a_late_client_that_stays_connected_is_asked_again(tmp_path):
    lost = []

    def post(message):
        if message.metadata.src_node_id == 11 and in_round(message, 2) and not lost:
            lost.append(message)
            return None
        return message

    network = replace(IMPATIENT, min_clients=3, retry=0.05)
    world = World(tmp_path, *SHORT, "rounds=2", network=network, post=post)
    assert [r.record["cohort"] for r in world.run()] == [[0, 1, 2]] * 2
    assert lost


def test_a_number_that_is_free_again_is_taken_and_a_lost_hello_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(node_registry, "PATIENCE", 0.05)
    hellos = []

    def post(message):
        if message.metadata.message_type == "query" and message.metadata.src_node_id == 12 and not hellos:
            hellos.append(message)
            return None
        return message

    world = World(tmp_path, *SHORT, "rounds=4", network=replace(QUICK, retry=0.001, join_timeout=0.3), post=post)

    def watch(event):
        if event.kind == "round" and event.round == 0:
            world.grid.join(31, {"client": 1})  # restarted, while its old node still counts as connected
        if event.kind == "round" and event.round == 1:
            world.grid.leave(11)

    world.server.watch = watch
    cohorts = [r.record["cohort"] for r in world.run()]
    assert hellos and cohorts[0] == [0, 1, 2] and cohorts[-1] == [0, 1, 2]


def test_an_order_of_an_earlier_round_is_refused(tmp_path):
    orders, strange = [], []

    def post(message):
        if message.metadata.dst_node_id == 11 and in_round(message, 2):
            orders.append(dict(message.content["order"]))
        if message.metadata.dst_node_id == 11 and in_round(message, 4):
            strange.append(message.content["order"]["round"])
            for key, value in orders[0].items():
                message.content["order"][key] = value
        return message

    world = World(tmp_path, "method.name=fedsa-lora", *SHORT, "rounds=4", post=post)
    rounds = world.run()
    assert strange == [3] and rounds[3].record["cohort"] == [0, 2]
    assert "ValueError" in rounds[3].record["absent"][1]


def test_a_fold_that_does_not_fit_leaves_the_base_as_it_was(tmp_path):
    world = World(tmp_path, "method.name=fedex-lora", *SHORT, "rounds=1")
    world.run()
    model, store = world.base.federation.model, ClientStore(tmp_path / "run")
    held = store.load(0)
    world.base.apply_base_updates(held.base_updates, store)
    before = {p: x.module.base.weight.clone() for p, x in model.parts.items() if hasattr(x.module, "base")}
    good, bad = list(before)[:2]
    name = store.add_base_update(
        {
            good: (Factors(torch.ones(WIDTH, 1), torch.ones(1, WIDTH)),),
            bad: (Factors(torch.ones(5, 1), torch.ones(1, 7)),),
        }
    )
    with pytest.raises(RuntimeError):
        world.base.apply_base_updates((*held.base_updates, name), store)
    world.base.apply_base_updates(held.base_updates, store)
    assert all(torch.equal(model.parts[p].module.base.weight, x) for p, x in before.items())


def test_a_party_with_another_configuration_is_left_out(tmp_path):
    world = World(tmp_path, "rounds=1", network=replace(QUICK, join_timeout=0.02))
    world.base = type(world.base)(config("rounds=1", "training.learning_rate=0.5").federation())
    world.server.at = world.server.begin(world.federation)
    world.server._registry.wait(0.02)
    assert not world.server._registry.connected_clients()
    assert "its configuration, its pretrained model" in world.events[-1].text
    for own in ("engine.threads=2", "task.data=/elsewhere", "task.label=y", "model.name=/models/vit"):
        assert config(own).table != config().table
        assert fingerprint(config(own).table) == fingerprint(config().table)


def test_a_node_that_goes_while_it_is_asked_is_not_waited_for(tmp_path):
    """Its message is lost with it, and a node that comes back knows nothing of it."""

    def post(message):
        if message.metadata.dst_node_id == 11 and in_round(message, 2):
            world.grid.leave(11)
        return message

    world = World(tmp_path, *SHORT, "rounds=3", network=replace(QUICK, round_timeout=60.0), post=post)
    rounds = world.run()
    assert [r.record["cohort"] for r in rounds] == [[0, 1, 2], [0, 2], [0, 2]]
    assert rounds[1].record["absent"] == {1: "its node was gone while it was asked"}


def failing(*clients, kind="train"):
    """A postman for whom these clients' turns fail, until they are taken out of the set that is returned with it."""
    bad = set(clients)

    def post(message):
        if message.metadata.src_node_id - 10 in bad and message.metadata.message_type == kind:
            return Message(
                Error(1001, "its turn failed (OutOfMemoryError); its own log says why"), reply_to=_asked(message)
            )
        return message

    return post, bad


def test_turns_that_fail_again_and_again_end_the_run_with_the_reason_of_each(tmp_path):
    post, _ = failing(0, 2)
    world = World(tmp_path, *SHORT, "rounds=2", network=replace(QUICK, repair_timeout=0.3), post=post)
    with pytest.raises(TooFewError) as error:
        world.run()
    why = "(its turn failed (OutOfMemoryError); its own log says why)"
    assert f"1 of 3 clients can take part, and it needs 2; left out: client 0 {why}, client 2 {why}." in str(
        error.value
    )
    texts = [e.text for e in world.events if e.kind == "waiting"]
    assert "the run ends if this lasts for 0.3 seconds (flower.repair_timeout)" in "".join(texts)


def test_a_turn_that_works_again_in_time_is_waited_for(tmp_path):
    post, bad = failing(0, 2)
    world = World(tmp_path, *SHORT, "rounds=2", network=replace(QUICK, repair_timeout=60.0), post=post)

    def watch(event):
        if event.kind == "waiting" and "repair_timeout" in event.text:
            bad.clear()

    world.server.watch = watch
    assert [r.record["cohort"] for r in world.run()] == [[0, 1, 2]] * 2


def test_parties_that_are_away_can_still_come_and_are_waited_for_longer(tmp_path):
    """Only who is there and fails, or is left out, must be mended in time."""
    network = replace(QUICK, repair_timeout=0.05, join_timeout=0.02)
    world = World(tmp_path, *SHORT, "rounds=1", network=network)
    world.grid.leave(11)
    world.grid.leave(12)
    pause, looks = world.server._pause, []

    def counted():
        looks.append(time.monotonic())
        if looks[-1] - looks[0] > 0.5 and 11 not in world.grid.get_node_ids():
            world.grid.join(11, {"client": 1})
        pause()

    world.server._pause = counted
    assert world.run()[0].record["cohort"] == [0, 1]
