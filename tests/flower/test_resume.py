"""A server that dies goes on from its folder with the bits of a run that was never broken."""

import json

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora.config import ConfigError
from fedlora.flower.server import serve
from fedlora.state import load_tree
from tests.flower.test_engine import plain, trained
from tests.flower.world import World, config, overrides, same


class DiedError(Exception):
    """What a server process is gone with."""


def dying(kind, round):
    def watch(event):
        if event.kind == kind and event.round == round:
            raise DiedError

    return watch


@pytest.mark.parametrize("when", [("turn", 1), ("evaluation", 1), ("round", 1), ("turn", 0), ("round", 0)], ids=str)
@pytest.mark.parametrize("name", ["fedit", "fedsa-lora", "fedex-lora", "ravan"])
def test_the_same_bits_after_a_break_at_any_point(name, when, tmp_path):
    settings = [*overrides(name), "rounds=3", "flower.poll=0.001", "flower.join_timeout=2.0"]
    here = fedlora.run(config(*settings))
    world = World(tmp_path / "nodes", *settings)
    with pytest.raises(DiedError):
        serve(world.config, world.grid, tmp_path / "run", dying(*when))
    again = serve(world.config, world.grid, tmp_path / "run")
    assert same(again.shared, here.shared)
    token = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    world.server.token, world.server.at = token, type("", (), {"counted": dict.fromkeys(range(3), 2)})
    for client, kept in here.kept.items():
        assert same(trained(world.kept(client)), trained(kept))
    assert [plain(r) for r in map(_numbered, again.records)] == [plain(r) for r in here.records]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert again.summary["rounds"] == 3


def _numbered(record):
    return {**record, "loss": {int(k): v for k, v in record["loss"].items()}}


def test_a_finished_run_another_configuration_and_a_foreign_folder_are_refused(tmp_path):
    quick = ["flower.poll=0.001", "flower.join_timeout=2.0", "rounds=1"]
    world = World(tmp_path / "nodes", *quick)
    serve(world.config, world.grid, tmp_path / "run")
    before = load_tree(tmp_path / "run" / "shared.safetensors")
    with pytest.raises(ConfigError, match="holds this run, finished; raise rounds, or choose another folder"):
        serve(world.config, world.grid, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of another configuration; choose another folder"):
        serve(config(*quick, "training.learning_rate=1e-3"), world.grid, tmp_path / "run")
    fedlora.run(config("rounds=1"), tmp_path / "other")
    with pytest.raises(ConfigError, match="holds a run already"):
        serve(world.config, world.grid, tmp_path / "other")
    assert same(load_tree(tmp_path / "run" / "shared.safetensors"), before)
    longer = World(tmp_path / "nodes", *quick[:2], "rounds=2")
    assert len(serve(longer.config, longer.grid, tmp_path / "run").records) == 2


def test_a_refused_configuration_leaves_the_folder_as_it_was(tmp_path):
    quick = ["flower.poll=0.001", "flower.join_timeout=2.0", "rounds=1"]
    world = World(tmp_path / "nodes", *quick)
    serve(world.config, world.grid, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for other in ("training.learning_rate=1e-3", "rounds=1"):
        with pytest.raises(ValueError, match="choose another folder"):
            serve(config(*quick, other), world.grid, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_two_runs_never_write_into_one_folder(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    world = World(tmp_path / "nodes", "flower.poll=0.001", "flower.join_timeout=2.0", "rounds=2")
    refused = []

    def second(event):
        if event.kind == "round" and not refused:
            with pytest.raises(ConfigError, match="another run writes into") as found:
                serve(world.config, world.grid, tmp_path / "run")
            refused.append(found)

    assert len(serve(world.config, world.grid, tmp_path / "run", second).records) == 2
    assert refused
