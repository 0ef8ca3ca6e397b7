"""Hostile clients on the grid: quarantined, left out and outvoted as in one process, with the same bits."""

from dataclasses import replace

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora.engines.checkpoint import Checkpoints
from tests.fixtures.flower import QUICK, World, config, records_agree, same, trained

MINE = "evaluation={every=9, measure=false}"
CASES = {
    "stopped at the door, then left out": (
        "attack={name='nan', clients=[1], start=2}",
        "validation.strikes=1",
        "rounds=3",
    ),
    "too large beside the others": ("attack={name='scaling', clients=[1], scale=100.0}", "method.name=fedsa-lora"),
    "outvoted": ("attack={name='sign-flip', clients=[1], scale=8.0}", "robust={name='trimmed', attackers=0.4}"),
    "pulled back, where base updates are made": (
        "attack={name='gaussian', clients=[1]}",
        "robust={name='clip'}",
        "method.name=flora",
    ),
    "knowing the others": ("attack={name='copy', clients=[1]}", "rounds=3"),
    "on its rows": ("attack={name='label-flip', clients=[1]}",),
}


@pytest.mark.parametrize("case", CASES)
def test_engines_agree_on_hostile_clients(case, tmp_path):
    here, world = fedlora.run(config(MINE, *CASES[case])), World(tmp_path, MINE, *CASES[case])
    there = world.run()
    assert same(there[-1].shared, here.shared)
    assert records_agree(there, here.records)
    assert [r.record["bytes"]["up"] for r in there] == [r["bytes"]["up"] for r in here.records]
    for client, tree in here.kept.items():
        assert same(trained(world.kept(client)), trained(tree)), f"client {client}"
    said = [r.record for r in there if {"quarantined", "robust"} & r.record.keys()]
    assert said or case == "on its rows"


def test_a_client_that_is_left_out_stays_out_when_the_server_goes_on(tmp_path):
    settings = ("attack={name='nan', clients=[1]}", "validation.strikes=1", MINE, "rounds=3")
    world = World(tmp_path / "nodes", *settings)
    checkpoints = Checkpoints(tmp_path / "run", "config", "accuracy")
    checkpoints.begin(world.federation)
    rounds = world.server.run(world.federation)
    checkpoints.after(next(rounds), world.server, last=True)
    later = World(tmp_path / "nodes", *settings)
    checkpoints.begin(later.federation)
    at = checkpoints.load(checkpoints.newest(), later.federation, later.server)
    assert at.conduct["strikes"] == {"1": 1}
    assert [r.record["cohort"] for r in later.run(at)] == [[0, 2], [0, 2]]


def test_the_server_waits_for_good_uploads_not_for_any(tmp_path):
    world = World(
        tmp_path, "attack={name='nan', clients=[0, 1], start=1}", MINE, "rounds=1",
        network=replace(QUICK, min_clients=2, retry=0.05),
    )  # fmt: skip
    looks = []

    def watch(event):
        if event.kind == "waiting":
            looks.append(event.text)
            world.server.stopped = len(looks) == 2

    world.server.watch = watch
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert set(looks) == {
        "1 of at least 2 clients have answered; waiting for more",
        "1 of 3 clients can take part, and it needs 2; the run ends if this lasts for 60 seconds (flower.repair_timeout)",
    }
