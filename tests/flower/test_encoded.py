"""Encoded messages on the grid: the bits and the book of one process, and what a lost reply does not break."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")

from flwr.app import Array, ArrayRecord

import fedlora
from fedlora.files import Limits
from fedlora.flower.serve import run_server
from fedlora.flower.wire import record_to_tree, tree_to_record
from fedlora.security.validation.expected import RefusedError
from tests.fixtures.flower import (
    HIDDEN,
    QUICK,
    SERVED,
    DiedError,
    World,
    config,
    counting,
    dying,
    overrides,
    records_agree,
    same,
    trained,
)  # fmt: skip

FINE = ["compression.up=int8", "compression.down=bfloat16", "compression.error_feedback=true"]
COARSE = ["compression.up=['top-k', 'int4']", "compression.down=['top-k', 'int8']", "compression.top_k=0.2",
          "compression.error_feedback=true"]  # fmt: skip
FOLDING = ["compression.up=float16", "compression.down=int8", "compression.base_updates=bfloat16"]
SHORT = ["rounds=3", "training.local_steps=1", "evaluation.measure=false"]
RUNS = [
    ("fedit", FINE), ("fedit", COARSE), ("fedsa-lora", COARSE), ("rolora", COARSE), ("fedex-lora", FOLDING),
    ("flora", FOLDING), ("ravan", FINE), ("hetlora", [*COARSE, "adapter.rank=4", "clients.ranks=[1, 4, 2]"]),
]  # fmt: skip


@pytest.mark.parametrize("name,how", RUNS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(RUNS)])
def test_bits_and_book_are_those_of_one_process(name, how, tmp_path):
    settings = [*overrides(name), *SHORT, *how, "evaluation.every=3", "clients.per_round=2"]
    crossed = {"up": 0, "down": 0}
    here, world = fedlora.run(config(*settings)), World(tmp_path, *settings, post=counting(crossed))
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    for client, kept in here.kept.items():
        assert same(trained(world.kept(client)), trained(kept)), f"client {client}"
    assert records_agree(rounds, here.records)
    assert [r.record["bytes"]["up"] for r in rounds] == [r["bytes"]["up"] for r in here.records]
    assert [r.record["bytes"]["down"] for r in rounds[:2]] == [r["bytes"]["down"] for r in here.records[:2]]
    for direction, total in crossed.items():
        assert total == sum(sum(r.record["bytes"][direction].values()) for r in rounds)


def test_a_reply_that_is_lost_adds_no_difference_twice(tmp_path):
    """The party took the difference in, and the server does not know: it is asked again, with the same difference."""
    lost = []

    def post(message):
        up = message.metadata.src_node_id == 11
        if up and message.metadata.group_id == "2" and message.metadata.message_type == "train" and not lost:
            lost.append(message)
            return None
        return message

    patient = replace(QUICK, min_clients=3, round_timeout=0.05)
    settings = [*SHORT, *COARSE]
    here, world = fedlora.run(config(*settings)), World(tmp_path, *settings, network=patient, post=post)
    rounds = world.run()
    assert lost and same(rounds[-1].shared, here.shared)
    assert not any("everything" in event.text for event in world.events), "it was found to hold what it should"


def test_an_upload_with_a_false_code_is_left_out(tmp_path):
    def post(message):
        if message.metadata.src_node_id == 11 and message.has_content() and "leaves" in message.content:
            tree = {p: dict(x) for p, x in record_to_tree(message.content["leaves"]).items()}
            part = next(p for p, x in tree.items() if "A@codes" in x)
            tree[part]["A@codes"] = tree[part]["A@codes"][:, :-1]
            message.content["leaves"] = tree_to_record(tree)
        return message

    world = World(tmp_path, "rounds=1", "compression.up=int8", post=post)
    (done,) = world.run()
    assert done.record["cohort"] == [0, 2] and "codes" in done.record["quarantined"][1]


def test_an_upload_beyond_the_limit_is_left_out(tmp_path):
    world = World(tmp_path, "rounds=1", "compression.max_upload_mb=0.001")
    world.server._wait = lambda *found: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert all("are the most that is taken" in why for why in world.server.absent.values()) and world.server.absent


def test_arrays_are_looked_at_before_they_are_read():
    content = tree_to_record({"p": {"A": torch.zeros(4, 4)}})["leaves"].data
    for array in (
        Array(dtype="uint8", shape=(2**40,), stype="safetensors", data=content),
        Array(dtype="float32", shape=(len(content),), stype="safetensors", data=content),
        Array(dtype="uint8", shape=(len(content),), stype="numpy.ndarray", data=content),
        Array(dtype="uint8", shape=(len(content) - 1,), stype="safetensors", data=content[:-1]),
    ):
        with pytest.raises(RefusedError):
            record_to_tree(ArrayRecord({"leaves": array}))
    with pytest.raises(RefusedError, match="most that is taken"):
        record_to_tree(tree_to_record({"p": {"A": torch.zeros(4, 4)}}), Limits(size=100))


@pytest.mark.parametrize("how", [FINE, COARSE], ids=["fine", "coarse"])
def test_a_server_that_dies_goes_on_with_the_same_bits(how, tmp_path):
    """What is owed on both sides, and what was served last, are in the checkpoint and with the parties."""
    settings = [*SHORT, *how, *SERVED]
    here, world = fedlora.run(config(*settings)), World(tmp_path / "nodes", *settings)
    with pytest.raises(DiedError):
        run_server(world.config, world.grid, tmp_path / "run", dying("round", 1))
    assert same(run_server(world.config, world.grid, tmp_path / "run").shared, here.shared)


def test_what_is_served_may_be_encoded_where_uploads_are_hidden(tmp_path):
    settings = ["rounds=2", "training.local_steps=1", "compression.down=int8"]
    rounds = World(tmp_path, *settings, network=HIDDEN).run()
    assert rounds[-1].record["cohort"] == [0, 1, 2] and "absent" not in rounds[-1].record
    plain = fedlora.run(config(*settings))
    assert rounds[-1].record["bytes"]["down"] == plain.records[-1]["bytes"]["down"]
