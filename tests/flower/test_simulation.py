"""Flower's own simulation, really run: Ray starts, its actors train, and the bits are those of one process."""

import json
import logging
import warnings
from dataclasses import replace

import pytest

pytest.importorskip("ray", reason="needs the flower-simulation extra")

from flwr.serverapp import ServerApp

import fedlora
from fedlora import methods
from fedlora.engines.flower.node import Node
from fedlora.engines.flower.party import client_app, handled
from fedlora.engines.flower.server import Federated
from fedlora.engines.flower.store import Store
from fedlora.flower.own import number
from fedlora.flower.parties import base
from fedlora.flower.simulation import _play
from tests.flower.test_engine import trained
from tests.flower.world import QUICK, agree, config, overrides, records_agree, same

pytestmark = [
    pytest.mark.flower, pytest.mark.slow, pytest.mark.xdist_group("flower"), pytest.mark.filterwarnings("ignore"),
]  # fmt: skip


def several(tables, folder):
    """A client app of several federations, told apart by their run; actors load what they are asked for."""
    texts = {name: json.dumps(table) for name, table in tables.items()}

    def turns(kind, content, context):
        client = number(context.node_config)
        return handled(kind, content, lambda run: Node(base(texts[run]), client, Store(folder / run)))

    return client_app(turns)


def test_every_method_ends_with_the_bits_of_one_process(tmp_path):
    configs = {
        name: config(*overrides(name), "rounds=3", "engine.threads=1", "evaluation.every=3") for name in methods.names()
    }
    ends = {}
    server = ServerApp()

    @server.main()
    def main(grid, context):
        for name, one in configs.items():
            f = one.federation()
            engine = Federated(federation=f, network=replace(QUICK, join_timeout=100), token=name, grid=grid)
            ends[name] = list(engine.run(f)), dict(engine.at.counted)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    _play(server, several({name: one.table for name, one in configs.items()}, tmp_path), 3, 1)
    assert list(ends) == methods.names()
    for name, (rounds, counted) in ends.items():
        here = fedlora.run(configs[name])
        assert same(rounds[-1].shared, here.shared), name
        assert records_agree(rounds[-1:], here.records[-1:]), name
        for client, kept in here.kept.items():
            theirs = Store(tmp_path / name).load(client).settled(counted[client]).kept
            assert same(trained(theirs), trained(kept)), (name, client)


def test_a_run_on_the_simulation_leaves_the_folder_of_a_run_in_one_process(tmp_path):
    settings = ("method.name=fedsa-lora", "engine.threads=1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = fedlora.run(config(*settings, "engine.name=flower-simulation"), tmp_path / "there")
    here = fedlora.run(config(*settings), tmp_path / "here")
    assert same(there.shared, here.shared)
    assert agree(there.summary["final"], here.summary["final"])
    # A checkpoint's name ends with a digest of its content, and bytes are counted in another order here.
    there, here = (
        {str(p.relative_to(r)).rpartition("-")[0] or p.relative_to(r) for p in r.rglob("*")}
        for r in (tmp_path / "there", tmp_path / "here")
    )
    assert there == here


def test_an_error_of_the_server_ends_the_simulation_with_that_error():
    with pytest.raises(AssertionError, match="the watcher had enough"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fedlora.run(config("engine.threads=1", "engine.name=flower-simulation"), watch=had_enough)


def had_enough(event):
    assert event.kind != "round", "the watcher had enough"
