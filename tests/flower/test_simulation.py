"""Flower's own simulation, really run: Ray starts, its actors train, and the bits are those of one process."""

import importlib.util
import json
import logging
import warnings
from functools import cache

import pytest

pytest.importorskip("ray", reason="needs the flower-simulation extra")

from flwr.serverapp import ServerApp

import fedlora
from fedlora.engines.network_settings import Network
from fedlora.flower.client import Node, SharedBase
from fedlora.flower.client_messages import build_client_app, handle_message
from fedlora.flower.client_store import ClientStore
from fedlora.flower.deploy.node_config import read_client
from fedlora.flower.server import FlowerLoop
from fedlora.flower.simulation import _run_simulation
from fedlora.methods import METHODS
from fedlora.runs.config import build
from tests.fixtures.flower import agree, config, overrides, records_agree, same, trained

pytestmark = [pytest.mark.flower, pytest.mark.xdist_group("flower"), pytest.mark.filterwarnings("ignore")]

NETWORK = Network(join_timeout=600.0, poll=0.03, retry=0.3)  # Ray's actors take some time to start
FOUR = ("clients={count=4, partition={name='dirichlet', alpha=0.5}}", "engine.threads=1", "training.local_steps=2",
        "evaluation={every=3, measure=false}")  # fmt: skip
HARDENED = {
    "validation": ("method.name=fedsa-lora", "attack={name='nan', clients=[1], start=2}", "validation.strikes=1"),
    "robust": ("attack={name='sign-flip', clients=[2], scale=3.0}", "robust={name='krum'}"),
    "codec": ("compression={up=['top-k', 'int8'], top_k=0.3, down='int4', error_feedback=true}",),
    "privacy": ("privacy={level='client', noise_multiplier=0.5, clip=0.1}", "method.weighting=uniform"),
}  # fmt: skip
OPACUS = importlib.util.find_spec("opacus") is not None  # of the dp extra


@cache
def base(text):
    """What a process has for one federation; an actor keeps it for each that it is asked for."""
    return SharedBase(build(json.loads(text)).federation())


def several(tables, folder):
    """A client app of several federations, told apart by their run."""
    texts = {name: json.dumps(table) for name, table in tables.items()}

    def turns(kind, content, context):
        client = read_client(context.node_config)
        return handle_message(kind, content, lambda run: Node(base(texts[run]), client, ClientStore(folder / run)))

    return build_client_app(turns)


@pytest.mark.slow
def test_every_method_and_every_hardened_run_end_with_the_bits_of_one_process(tmp_path):
    """Two rounds of each method; validation, a robust rule, a codec with error feedback and client-level privacy in three."""
    hardened = {name: told for name, told in HARDENED.items() if OPACUS or name != "privacy"}
    configs = {name: config(*overrides(name), *FOUR, "rounds=2") for name in METHODS.names()}
    configs |= {name: config(*told, *FOUR, "rounds=3") for name, told in hardened.items()}
    ends = {}
    server = ServerApp()

    @server.main()
    def main(grid, context):
        for name, one in configs.items():
            engine = FlowerLoop(federation=one.federation(), network=NETWORK, token=name, grid=grid)
            ends[name] = list(engine.run(engine.federation)), dict(engine.at.counted)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    _run_simulation(server, several({name: one.table for name, one in configs.items()}, tmp_path), 4, 1)
    assert list(ends) == list(configs), "a simulation that broke off"
    for name, (rounds, counted) in ends.items():
        here = fedlora.run(configs[name])
        assert same(rounds[-1].shared, here.shared), name
        assert records_agree(rounds, json.loads(json.dumps(here.records), object_hook=whole)), name
        for client, kept in here.kept.items():
            theirs = ClientStore(tmp_path / name).load(client).resolve_pending(counted.get(client, -1)).kept
            assert same(trained(theirs), trained(kept)), (name, client)
    assert (
        ends["validation"][0][1].record["quarantined"].keys() == {1} and 1 in ends["validation"][0][2].record["absent"]
    )
    assert len(ends["robust"][0][-1].record["robust"]["kept"]) == 1, "the rule chose"
    assert not OPACUS or ends["privacy"][0][-1].record["privacy"]["epsilon"] > 0


def whole(table):
    """Keys that JSON made strings of, as they were."""
    return {int(key) if key.isdecimal() else key: value for key, value in table.items()}


def test_a_run_on_the_simulation_leaves_the_folder_of_a_run_in_one_process(tmp_path):
    settings = ("method.name=fedsa-lora", "engine.threads=1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = fedlora.run(config(*settings, "engine.name=flower-simulation"), tmp_path / "there")
    here = fedlora.run(config(*settings), tmp_path / "here")
    assert same(there.shared, here.shared)
    assert there.kept.keys() == here.kept.keys()
    for client, kept in here.kept.items():
        assert same(trained(there.kept[client]), trained(kept)), client
    assert agree(there.summary["final"], here.summary["final"])
    # A checkpoint's name ends with a digest of its content, and bytes are counted in another order here.
    there, here = (
        {str(p.relative_to(r)).rpartition("-")[0] or p.relative_to(r) for p in r.rglob("*")}
        for r in (tmp_path / "there", tmp_path / "here")
    )
    assert there == here


@pytest.mark.slow
def test_an_error_of_the_server_ends_the_simulation_with_that_error():
    with pytest.raises(AssertionError, match="the watcher had enough"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fedlora.run(config("rounds=1", "engine.threads=1", "engine.name=flower-simulation"), watch=had_enough)


def had_enough(event):
    assert event.kind != "round", "the watcher had enough"
