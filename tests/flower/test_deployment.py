"""A SuperLink and SuperNodes as processes, with TLS and node keys: the same bits, and a node that is killed."""

import json
import stat
import threading
import time

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora.engines.flower.store import Store
from fedlora.flower.app import init
from fedlora.flower.processes import Loopback
from fedlora.state import load_tree
from tests.flower.test_engine import trained
from tests.flower.world import agree, config, same

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.xdist_group("flower")]

SECONDS = 900  # that a run may take


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def flower(place):
    nodes = {f"party-{k}": {"client": k, "state": str(place / "nodes" / str(k)), "engine.threads": 1} for k in range(3)}
    with Loopback(nodes, place / "logs") as running:
        yield running


def written(place, name, *overrides):
    """A federation of three rounds, its app, and the folder that its run will have."""
    one = config(f"method.name={name}", "engine.threads=1", "rounds=3", "evaluation.every=3", *overrides)
    return one, init(place / f"app-{name}", one, place / name), place / name


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(place, folder, client):
    run = json.loads((folder / "run.json").read_text())["run"]
    return Store(place / "nodes" / str(client) / run).load(client)


def test_a_run_that_a_superlinks_restart_broke_goes_on_and_ends_with_the_bits_of_one_process(flower, place):
    """FedEx, for its folds; what was done before the restart and after it is one run."""
    (one, app, folder), lines = written(place, "fedex-lora"), []
    restarter = threading.Thread(target=lambda: (_after_a_round(folder), flower.restart_superlink()))
    restarter.start()
    assert flower.run(app, watch=lines.append, timeout=SECONDS) == 1, flower.outcome
    restarter.join()
    assert 1 <= len(records_of(folder)) < 3
    assert flower.run(app, watch=lines.append, timeout=SECONDS) == 0, (flower.outcome, lines[-20:])
    here = fedlora.run(one, place / "here")
    assert same(load_tree(folder / "shared.safetensors"), here.shared)
    assert same(load_tree(folder / "folds.safetensors"), load_tree(place / "here" / "folds.safetensors"))
    there, ours = records_of(folder), records_of(place / "here")
    assert [r["round"] for r in there] == [1, 2, 3]
    assert [r["loss"] for r in there] == [r["loss"] for r in ours]
    assert agree(there[-1]["clients"], ours[-1]["clients"]) and agree(there[-1]["global"], ours[-1]["global"])


def _after_a_round(folder):
    log, until = folder / "metrics.jsonl", time.monotonic() + SECONDS
    while time.monotonic() < until:
        if log.exists() and log.read_text().count("\n") >= 1:
            return
        time.sleep(0.1)
    raise AssertionError("no round came to its end")


def test_a_node_that_is_killed_in_a_round_is_named_and_the_run_ends_without_it(flower, place):
    """FedSA: each party's B stays on its own disk; party 2 dies while it trains in round 2.

    The round waits until Flower has missed two of its heartbeats, a minute at most: no time of a slow machine is in it.
    """
    (_, app, folder), lines = written(place, "fedsa-lora", "training.local_steps=40"), []
    killer = threading.Thread(target=lambda: (_after_a_round(folder), flower.kill("party-2")))
    killer.start()
    assert flower.run(app, watch=lines.append, timeout=SECONDS) == 0, (flower.outcome, lines[-20:])
    killer.join()
    records = records_of(folder)
    assert records[0]["cohort"] == [0, 1, 2] and records[-1]["cohort"] == [0, 1]
    assert "2" in records[1]["absent"]
    assert any("client 2: " in line and line.startswith("round 2") for line in lines)
    for client in (0, 1):
        own = kept(place, folder, client).settled(2).kept
        assert any(layer.keys() == {"B"} for layer in own.values()) and "classifier" in trained(own)
        files = [p for p in (place / "nodes" / str(client)).rglob("*") if p.is_file()]
        assert files and all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in files)
