"""The federation on Flower ends with the bits of the one in this process; what crosses is what may cross."""

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora import methods
from fedlora.engines.flower.records import unpack
from tests.flower.world import ADAPTERS, World, config, counting, overrides, records_agree, same


def trained(kept):
    return {part: layer for part, layer in kept.items() if layer}


@pytest.mark.parametrize("name", methods.names())
def test_the_same_bits_as_in_one_process(name, tmp_path):
    settings = [*overrides(name), "rounds=3"]
    here = fedlora.run(config(*settings))
    world = World(tmp_path, *settings)
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    for client, kept in here.kept.items():
        assert same(trained(world.kept(client)), trained(kept)), f"client {client}"
    assert records_agree(rounds, here.records)
    folds, theirs = rounds[-1].folds.everything(), world.base.federation.model.parts
    for part in folds:
        mine = world.federation.model.parts[part].module.base.weight
        assert torch.equal(mine, theirs[part].module.base.weight), "the base weights with every fold in them"


def test_the_strategy_starts_as_flowers_own_do(tmp_path):
    world = World(tmp_path, "rounds=2")
    result = world.server.start(grid=world.grid)
    here = fedlora.run(config("rounds=2"))
    assert same(unpack(result.arrays), here.shared)
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == here.summary["final"]["global"]["accuracy"]
    assert result.evaluate_metrics_clientapp[2]["mean"] == here.summary["final"]["clients"]["mean"]


@pytest.mark.parametrize("name", methods.names())
def test_the_ledger_is_that_of_one_process_and_what_really_crossed(name, tmp_path):
    """Evaluated at the end only, so that what the last round made goes down once more than in one process."""
    settings = [*overrides(name), "rounds=3", "evaluation.every=3"]
    crossed = {"up": 0, "down": 0}
    here = [r["bytes"] for r in fedlora.run(config(*settings)).records]
    there = [r.record["bytes"] for r in World(tmp_path, *settings, post=counting(crossed)).run()]
    assert [r["up"] for r in there] == [r["up"] for r in here]
    assert [r["down"] for r in there[:2]] == [r["down"] for r in here[:2]]
    for direction, total in crossed.items():
        assert total == sum(sum(r[direction].values()) for r in there)


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "svd", "flora", "ravan"])
def test_unequal_clients_have_the_bits_of_one_process(name, tmp_path):
    ranks = {"ravan": "[1, 2, 1]"}.get(name, "[1, 4, 2]")
    adapter = ADAPTERS.get(name, ["adapter={name = 'lora', rank = 4, alpha = 8}"])
    settings = [f"method.name={name}", *adapter, f"clients.ranks={ranks}", "rounds=3"]
    here, world = fedlora.run(config(*settings)), World(tmp_path, *settings)
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    assert records_agree(rounds, here.records)


@pytest.mark.parametrize("setting", ["training.keep_optimizer=true", "clients.per_round=2", "model.overlay=true",
                                     "server.optimizer=adam", "training.schedule=linear"])  # fmt: skip
@pytest.mark.parametrize("name", ["fedit", "fedsa-lora"])
def test_settings_that_live_between_rounds_have_the_bits_of_one_process(name, setting, tmp_path):
    settings = [f"method.name={name}", setting, "rounds=4"]
    here, world = fedlora.run(config(*settings)), World(tmp_path, *settings)
    rounds = world.run()
    assert same(rounds[-1].shared, here.shared)
    assert records_agree(rounds, here.records)
