"""What leaves a party is what its method sends, a digest, and a few numbers: every message is read and checked."""

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")

from fedlora.files import digest
from fedlora.flower import wire as records
from tests.fixtures.federation import WEIGHTS
from tests.fixtures.flower import World, config, same

METRICS = {
    "query": {
        "client",
        "examples",
        "base_updates_held",
        "labels",
    },  # labels: 1 by name, 2 by position, whatever rows there are
    "train": {"round", "examples", "loss"},
    "evaluate": {"round", "accuracy.sum", "accuracy.count", "loss.sum", "loss.count"},
}
RECORDS = {"query": {"metrics", "holds"}, "train": {"metrics", "holds", "leaves"}, "evaluate": {"metrics", "holds"}}
SENT = {  # method -> leaves of an adapted weight that may go up; None: those below, with every leaf that is trained
    "fedsa-lora": {"A"}, "ffa-lora": {"B"}, "fed-sb": {"R"}, "ravan": {"H0", "H1"}, "local": set(), "feddpa": {"A", "B"},
}  # fmt: skip
PRIVATE_HEAD = {"fedsa-lora", "feddpa", "local"}


def test_every_message_against_the_allow_list(name, grid):
    world, up = grid(name).world, grid(name).up()
    assert {m.metadata.message_type for m in up} == set(METRICS)
    for message in up:
        kind, content = message.metadata.message_type, message.content
        assert set(content) == RECORDS[kind]
        assert set(content["metrics"]) == METRICS[kind]
        assert content["metrics"].get("labels", 1) == 1, "digits are matched by name"
        digests = content["holds"]["holds"].split()  # of what it holds; at first of what it makes, and of its base
        assert set(content["holds"]) == {"holds"} and {len(digest) for digest in digests} == {32}
        if kind == "train":
            _only_what_is_sent(name, world, message)


def _only_what_is_sent(name, world, message):
    for part, layer in records.record_to_tree(message.content["leaves"]).items():
        rule = world.federation.rules[part]
        allowed = SENT.get(name, {"A", "B"})
        if part in world.federation.heads:
            allowed = set() if name in PRIVATE_HEAD else {"weight", "bias"}
        assert set(layer) <= allowed, f"{name}: {part} sent {set(layer)}"
        assert set(layer) <= rule.adapter.trainable


def test_a_private_leaf_is_in_no_message_even_as_bytes(grid):
    run = grid("fedsa-lora")
    bodies = [m.content["leaves"]["leaves"].data for m in run.up() if "leaves" in m.content]
    assert len(bodies) == 3 * len(run.rounds)
    private = [x for layer in run.world.kept(0).values() for leaf, x in layer.items() if x.numel() > 8]
    assert len(private) == WEIGHTS + 2, "B of every adapted weight, and the classifier"
    for x in private:
        assert all(x.numpy().tobytes() not in body for body in bodies)


def test_what_goes_wrong_at_a_party_is_told_by_its_kind_only(tmp_path, capfd):
    world = World(tmp_path, "rounds=1")
    node = type(world.node(type("C", (), {"node_config": {"client": 0}}), "run"))

    def fails(self, *rest):
        raise ValueError("patient Jane Doe, born 1961, has no label")

    original, node.evaluate = node.evaluate, fails
    try:
        [done] = world.run()
    finally:
        node.evaluate = original
    assert set(done.record["unscored"].values()) == {"its turn failed (ValueError); its own log says why"}
    assert "clients" not in done.record
    assert "Jane Doe" in capfd.readouterr().err, "the party's own log has all of it"


def test_a_server_cannot_choose_where_a_party_writes(tmp_path):
    world = World(tmp_path / "nodes", "rounds=1", token="../../outside")
    world.server.network = type(world.server.network)(join_timeout=0.02, poll=0.01)
    world.server.at = world.server.begin(world.federation)
    world.server._registry.wait(0.02)
    assert not world.server._registry.connected_clients()
    assert not list(tmp_path.rglob("outside*"))


def test_the_digest_tells_every_difference():
    tree = {"a": {"A": torch.zeros(2, 3)}}
    seen = {digest(tree)}
    for other in (
        {"a": {"A": torch.zeros(3, 2)}}, {"a": {"B": torch.zeros(2, 3)}}, {"b": {"A": torch.zeros(2, 3)}},
        {"a": {"A": torch.zeros(2, 3).double()}}, {"a": {"A": -torch.zeros(2, 3)}},
    ):  # fmt: skip
        assert digest(other) not in seen
        seen.add(digest(other))
    assert digest({"a": {"A": torch.zeros(2, 6)[:, ::2]}}) == digest(tree)
    assert same(config().federation().model.initial(0), config().federation().model.initial(0))
