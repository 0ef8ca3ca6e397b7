"""Unequal clients on the grid: profiles, stragglers and dropouts with the bits, records and bytes of one process."""

from dataclasses import replace

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora.engines.clients import DROPPED
from fedlora.flower.client_store import ClientStore
from tests.fixtures.flower import HIDDEN, QUICK, TRAIN_ONLY, World, config, counting, records_agree, same, trained

UNEQUAL = [
    "clients.capability='uniform'",
    "clients.stragglers=0.4",
    "clients.dropout=0.3",
    "clients.count=4",
    "rounds=4",
]
BOTH = "clients.capability_scales=['rank', 'steps']"
WAITS = ["clients.count=4", "clients.dropout=0.25", "rounds=1", TRAIN_ONLY]
OWN = {
    "fedit": ["clients.capability_scales=['steps']"],
    "fedsa-lora": ["clients.capability_scales=['steps']", "training.keep_optimizer=true"],
    "hetlora": ["adapter.rank=4", BOTH],
    "ravan": ["adapter={name = 'multihead', heads = 4, head_rank = 4}", BOTH],
    "flora": [BOTH, "clients.per_round=3"],  # at a rank at which three base updates are smaller than the weight
}


@pytest.mark.parametrize("name", OWN)
def test_the_bits_records_and_bytes_of_one_process(name, tmp_path):
    settings = [f"method.name={name}", *UNEQUAL, *OWN[name], "evaluation.every=4"]
    crossed = {"up": 0, "down": 0}
    here, world = fedlora.run(config(*settings)), World(tmp_path, *settings, post=counting(crossed))
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    assert records_agree(rounds, here.records)
    for client, kept in here.kept.items():
        assert same(trained(world.kept(client)), trained(kept)), f"client {client}"
    there = [r.record["bytes"] for r in rounds]
    assert there[:3] == [r["bytes"] for r in here.records[:3]]
    assert there[3]["up"] == here.records[3]["bytes"]["up"], "the last round's scoring sends down once more"
    for direction, total in crossed.items():
        assert total == sum(sum(r[direction].values()) for r in there), "what is counted has crossed"
    gone = [client for r in rounds for client, why in r.record.get("absent", {}).items() if why == DROPPED]
    assert len(gone) >= 3 and any(r.record["stragglers"] for r in rounds), "there was something to agree on"


def test_a_dropped_clients_node_keeps_the_state_that_it_had(tmp_path):
    world = World(
        tmp_path, "method.name=fedsa-lora", *UNEQUAL, "clients.capability_scales=['steps']", "evaluation.every=4"
    )
    f, store, before, gone = world.federation, ClientStore(tmp_path / "run"), {}, 0
    for done in world.server.run(f):
        if done.number == 3:
            break  # the evaluation of the last round brings everybody up to date
        dropped = f.clients.draw_dropouts(done.number, f.seed)
        for client in range(4):
            held = store.load(client)
            assert (held.pending == done.number) == (client not in dropped)
            if client in dropped and client in before:
                assert same(held.trained, before[client].trained) and held.leaves.keys() == before[client].leaves.keys()
                gone += 1
            before[client] = held
    assert gone


def test_nobody_stands_in_for_who_dropped_out(tmp_path):
    world = World(
        tmp_path,
        "clients.count=6",
        "clients.per_round=3",
        "clients.dropout=0.34",
        "rounds=4",
        TRAIN_ONLY,
        "training.local_steps=1",
    )
    for done in world.run():
        assert done.record["cohort"] == world.federation.clients.remaining(done.number, 0)
        assert set(done.record["absent"].values()) == {DROPPED}


def test_a_round_that_waits_does_not_wait_for_who_dropped_out(tmp_path):
    """A node answers only when it is asked a second time; the one that dropped out is there, and is not asked again."""
    dropped, silent = config(*WAITS).clients.draw_dropouts(0, 0), []
    slow = config(*WAITS).clients.remaining(0, 0)[0]

    def post(message):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 10 + slow and not silent:
            silent.append(message)
            return None
        return message

    network = replace(QUICK, min_clients=3, round_timeout=0.05)
    world = World(tmp_path, *WAITS, network=network, post=post)
    (done,) = world.run()
    assert silent and len(dropped) == 1
    assert done.record["cohort"] == config(*WAITS).clients.remaining(0, 0) and done.record["absent"] == {
        dropped[0]: DROPPED
    }
    assert sum(event.kind == "waiting" and "have answered" in event.text for event in world.events) == 1


def test_new_clients_are_not_waited_for_nor_scored(tmp_path):
    settings = ["clients.count=4", "clients.new=1", "rounds=2"]
    here, world = fedlora.run(config(*settings)), World(tmp_path, *settings)
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    assert records_agree(rounds, here.records)
    assert rounds[-1].record["clients"]["each"][3] is None
    told = [event.text for event in world.events if "left out" in event.text]
    assert any("calls itself client 3" in text for text in told), "its node would not be let in"


def test_masked_rounds_leave_the_dropped_out(tmp_path):
    network = replace(HIDDEN, min_clients=3)
    settings = ["clients.count=4", "clients.dropout=0.25", "clients.stragglers=0.25", "rounds=2", TRAIN_ONLY]
    world = World(tmp_path, *settings, network=network)
    here = fedlora.run(config(*settings))
    for done, record in zip(world.run(), here.records):
        assert done.record["cohort"] == record["cohort"] and done.record["absent"] == record["absent"]
        assert done.record["loss"].keys() == record["loss"].keys()
    for part, layer in done.shared.items():
        for leaf, x in layer.items():
            assert (x - here.shared[part][leaf]).abs().max() < 1e-3, "a sum of numbers rounded for masking"
