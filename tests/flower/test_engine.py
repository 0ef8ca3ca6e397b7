"""The federation on Flower ends with the bits of the one in this process; what crosses is what may cross."""

import pytest
import torch

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora import methods
from tests.flower.world import World, config, overrides, same


def plain(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "bytes", "weights")}


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
    assert [plain(r.record) for r in rounds] == [plain(r) for r in here.records]
    folds, theirs = rounds[-1].folds.everything(), world.base.federation.model.parts
    for part in folds:
        mine = world.federation.model.parts[part].module.base.weight
        assert torch.equal(mine, theirs[part].module.base.weight), "the base weights with every fold in them"
