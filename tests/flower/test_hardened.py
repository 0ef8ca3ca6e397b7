"""On Ray as in one process: hygiene, a robust rule, a codec with error feedback, and client-level privacy, to the bit."""

import json
import logging
from dataclasses import replace

import pytest

pytest.importorskip("ray", reason="needs the flower-simulation extra")

from flwr.serverapp import ServerApp

import fedlora
from fedlora.engines.flower.server import Federated
from fedlora.engines.flower.store import Store
from fedlora.flower.simulation import _play
from tests.fixtures.federation import config
from tests.flower.test_engine import trained
from tests.flower.test_simulation import several
from tests.flower.world import QUICK, records_agree, same

pytestmark = [
    pytest.mark.flower, pytest.mark.slow, pytest.mark.xdist_group("flower"), pytest.mark.filterwarnings("ignore"),
]  # fmt: skip

SMALL = (
    "task.train_rows=64", "task.test_rows=32", "training.local_steps=1", "training.batch_size=8", "rounds=3",
    "clients={count=4, split={name='iid'}}", "evaluation.measure=false", "engine.threads=1", "evaluation.every=3",
)  # fmt: skip
CASES = {
    "hygiene": ("method.name=fedsa-lora", "attack={name='nan', clients=[1], start=2}", "hygiene.strikes=1"),
    "robust": ("attack={name='sign-flip', clients=[2], scale=3.0}", "robust={name='krum'}"),
    "codec": ("transport={up=['top-k', 'int8'], top_k=0.3, down='int4', error_feedback=true}",),
    "privacy": ("privacy={level='client', noise_multiplier=0.5, clip=0.1}", "method.weighting=uniform"),
}  # fmt: skip


def test_hardened_runs_end_with_the_bits_of_one_process(tmp_path):
    pytest.importorskip("opacus", reason="needs the dp extra")
    configs = {name: config(*SMALL, *settings) for name, settings in CASES.items()}
    ends = {}
    server = ServerApp()

    @server.main()
    def main(grid, context):
        for name, one in configs.items():
            engine = Federated(
                federation=one.federation(), network=replace(QUICK, join_timeout=100), token=name, grid=grid
            )
            ends[name] = list(engine.run(engine.federation)), dict(engine.at.counted)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    _play(server, several({name: one.table for name, one in configs.items()}, tmp_path), 4, 1)
    assert list(ends) == list(CASES), "a simulation that broke off"
    for name, (rounds, counted) in ends.items():
        here = fedlora.run(configs[name])
        assert same(rounds[-1].shared, here.shared), name
        assert records_agree(rounds, json.loads(json.dumps(here.records), object_hook=whole)), name
        for client, kept in here.kept.items():
            theirs = Store(tmp_path / name).load(client).settled(counted.get(client, -1)).kept
            assert same(trained(theirs), trained(kept)), (name, client)
    assert ends["hygiene"][0][1].record["quarantined"].keys() == {1} and 1 in ends["hygiene"][0][2].record["absent"]
    assert len(ends["robust"][0][-1].record["robust"]["kept"]) == 1, "the rule chose"
    assert ends["privacy"][0][-1].record["privacy"]["epsilon"] > 0


def whole(table):
    """Keys that JSON made strings of, as they were."""
    return {int(key) if key.isdecimal() else key: value for key, value in table.items()}
