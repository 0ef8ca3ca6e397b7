"""The federation on Flower ends with the bits of the one in this process; what crosses is what may cross."""

from collections import Counter
from itertools import accumulate

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora.flower.wire import record_to_tree
from tests.fixtures.flower import ADAPTERS, World, config, counting, records_agree, same, trained


def test_the_same_bits_as_in_one_process(name, grid, reference):
    here, (world, rounds, _) = reference(name), grid(name)
    assert same(rounds[-1].shared, here.shared)
    for client, kept in here.kept.items():
        assert same(trained(world.kept(client)), trained(kept)), f"client {client}"
    assert records_agree(rounds, here.records)
    base_updates, theirs = rounds[-1].base_updates.total(), world.base.federation.model.parts
    assert bool(base_updates) == bool(here.summary["base_updates"])
    for part in base_updates:
        mine = world.federation.model.parts[part].module.base.weight
        assert torch.equal(mine, theirs[part].module.base.weight), "the base weights with every fold in them"


def test_the_ledger_is_that_of_one_process_and_what_really_crossed(name, grid, reference):
    """A party scores what a round made, so it goes down before the next round does; in one process it goes with it."""
    here = [r["bytes"] for r in reference(name).records]
    there = [r.record["bytes"] for r in grid(name).rounds]
    assert [r["up"] for r in there] == [r["up"] for r in here]
    down = [list(accumulate((Counter(r["down"]) for r in side), Counter.__add__)) for side in (there, here)]
    assert down[0][:-1] == down[1][1:], "by the end of a round what had gone down by the end of the next one"
    crossed = {"up": 0, "down": 0}
    for message in grid(name).messages:
        counting(crossed)(message)
    for direction, total in crossed.items():
        assert total == sum(sum(r[direction].values()) for r in there), f"what is counted went {direction}"


def test_the_strategy_starts_as_flowers_own_do(tmp_path):
    world = World(tmp_path, "rounds=2")
    result = world.server.start(grid=world.grid)
    here = fedlora.run(config("rounds=2"))
    assert same(record_to_tree(result.arrays), here.shared)
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == here.summary["final"]["global"]["accuracy"]
    assert result.evaluate_metrics_clientapp[2]["mean"] == here.summary["final"]["clients"]["mean"]


RANKS = ["adapter={name = 'lora', rank = 4, alpha = 8}", "clients.ranks=[1, 4, 2]"]
SETTINGS = {
    "ranks": ("hetlora", RANKS),
    "ranks of products": ("flexlora", RANKS),
    "ranks beside a rest": ("svd", RANKS),
    "ranks that are stacked": ("flora", RANKS),
    "numbers of heads": ("ravan", [*ADAPTERS["ravan"], "clients.ranks=[1, 2, 1]"]),
    "what an absent client keeps": ("fedsa-lora", ["training.keep_optimizer=true", "clients.per_round=2"]),
    "moments of what is sent": ("fedit", ["training.keep_optimizer=true", "clients.per_round=2"]),
    "the server's own moments, and a schedule": ("fedit", ["server.optimizer=adam", "training.schedule=linear"]),
    "the server's moments of a part": ("fedsa-lora", ["server.optimizer=adam", "training.schedule=linear"]),
    "base updates beside the base": ("fedex-lora", ["model.overlay=true", "clients.per_round=2"]),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_have_the_bits_of_one_process(setting, tmp_path):
    """Unequal clients, and what lives on between rounds. Scored once, so that nobody is brought up to date in between."""
    name, own = SETTINGS[setting]
    own = [f"method.name={name}", *own, "rounds=4", "evaluation.every=4", "training.local_steps=2"]
    here, world = fedlora.run(config(*own)), World(tmp_path, *own)
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    assert records_agree(rounds, here.records)
    for client, kept in here.kept.items():
        assert same(trained(world.kept(client)), trained(kept)), f"client {client}"
    there = [r.record["bytes"] for r in rounds]
    assert there[:3] == [r["bytes"] for r in here.records[:3]], "the last round's scoring sends down once more"
