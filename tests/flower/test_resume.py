"""A server that dies goes on from its folder with the bits of a run that was never broken."""

import json

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import torch

import fedlora
from fedlora.engines.base_updates import base_update_from_tree
from fedlora.engines.checkpoint import config_digest
from fedlora.files import load_tree
from fedlora.flower.client_store import ClientStore
from fedlora.flower.serve import run_server
from fedlora.schema import ConfigError
from tests.fixtures.federation import REFERENCE
from tests.fixtures.flower import (
    SERVED,
    TRAIN_ONLY,
    DiedError,
    World,
    agree,
    config,
    dying,
    overrides,
    plain,
    same,
    trained,
)  # fmt: skip

SHORT = (*SERVED, TRAIN_ONLY, "training.local_steps=1")


POINTS = [("turn", 0), ("round", 0), ("turn", 1), ("evaluation", 1), ("round", 1)]


def _as_if_never_broken(folder, world, result, here):
    """Bits, records, and what each party keeps on its own disk are those of the whole run."""
    assert same(result.shared, here.shared)
    token, last = json.loads((folder / "run.json").read_text())["run"], here.summary["rounds"] - 1
    for client, kept in here.kept.items():
        assert same(trained(world.kept_in(token, client, last)), trained(kept)), f"client {client}"
    assert agree([plain(r) for r in map(_numbered, result.records)], [plain(r) for r in here.records])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, last + 2))
    assert result.summary["rounds"] == last + 1


@pytest.mark.parametrize("when", POINTS, ids=str)
@pytest.mark.parametrize("name", ["fedsa-lora", "fedex-lora"])
def test_the_same_bits_after_a_break_at_any_point(name, when, tmp_path, reference):
    world = World(tmp_path / "nodes", *overrides(name), *REFERENCE, *SERVED)
    with pytest.raises(DiedError):
        run_server(world.config, world.grid, tmp_path / "run", dying(*when))
    again = run_server(world.config, world.grid, tmp_path / "run")
    _as_if_never_broken(tmp_path / "run", world, again, reference(name))


@pytest.mark.parametrize("name", ["fedit", "ravan"])
def test_the_same_bits_after_a_break_at_every_point(name, tmp_path, reference):
    world = World(tmp_path / "nodes", *overrides(name), *REFERENCE, *SERVED)
    for when in POINTS:
        with pytest.raises(DiedError):
            run_server(world.config, world.grid, tmp_path / "run", dying(*when))
    again = run_server(world.config, world.grid, tmp_path / "run")
    _as_if_never_broken(tmp_path / "run", world, again, reference(name))


def _numbered(record):
    return {**record, "loss": {int(k): v for k, v in record["loss"].items()}}


def test_a_finished_run_another_configuration_and_a_foreign_folder_are_refused(tmp_path, reference):
    """Every refusal leaves the folder as it was."""
    world = World(tmp_path / "nodes", *SHORT, "rounds=1")
    run_server(world.config, world.grid, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="holds this run, finished; raise rounds, or choose another folder"):
        run_server(world.config, world.grid, tmp_path / "run")
    with pytest.raises(
        ValueError, match="holds a run of another configuration; go on with .*, or choose another folder"
    ):
        run_server(config(*SHORT, "rounds=1", "training.learning_rate=1e-3"), world.grid, tmp_path / "run")
    foreign = reference("fedit")
    with pytest.raises(ConfigError, match="holds a run already"):
        run_server(world.config, world.grid, foreign.folder)
    assert not (foreign.folder / "run.json").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    longer = World(tmp_path / "nodes", *SHORT, "rounds=2")
    assert len(run_server(longer.config, longer.grid, tmp_path / "run").records) == 2


def test_base_updates_of_a_round_that_is_run_again_with_others_are_not_taken_for_the_first(tmp_path):
    """Round 2 is folded and sent, then the server dies; it runs again without client 1, which returns in round 3."""
    world = World(tmp_path / "nodes", "method.name=fedex-lora", "rounds=4", *SERVED, "flower.join_timeout=0.05")
    with pytest.raises(DiedError):
        run_server(world.config, world.grid, tmp_path / "run", dying("evaluation", 1))
    world.grid.leave(11)

    def watch(event):
        if event.kind == "round" and event.round == 1:
            world.grid.join(11, {"client": 1})

    result = run_server(world.config, world.grid, tmp_path / "run", watch)
    assert [r["cohort"] for r in result.records] == [[0, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    token = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    stores = [ClientStore(tmp_path / "nodes" / token).load(client) for client in range(3)]
    assert stores[0].base_updates == stores[1].base_updates == stores[2].base_updates
    assert len({s.base for s in stores}) == 1
    for number, name in enumerate(stores[0].base_updates):
        (file,) = (tmp_path / "run" / "checkpoints" / "base_updates").glob(f"{number:06d}-*.safetensors")
        ours = base_update_from_tree(load_tree(file))
        theirs = ClientStore(tmp_path / "nodes" / token).load_base_update(name)
        assert all(torch.equal(f.U, theirs[p][i].U) for p, several in ours.items() for i, f in enumerate(several))


def test_a_line_that_was_cut_off_a_broken_checkpoint_and_a_refusal_that_writes_nothing(tmp_path, reference):
    own = (*overrides("fedit"), *REFERENCE, *SERVED)
    world = World(tmp_path / "nodes", *own)
    with pytest.raises(DiedError):
        run_server(world.config, world.grid, tmp_path / "run", dying("turn", 2))
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"round": 3, "coh')
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run_server(config(*own, "training.learning_rate=1e-3"), world.grid, tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    again = run_server(world.config, world.grid, tmp_path / "run")
    assert [r["round"] for r in again.records] == [1, 2, 3, 4]
    assert same(again.shared, reference("fedit").shared)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:50])
    with pytest.raises(ValueError, match="holds no checkpoint to go on from: 000004-.* was cut off or altered"):
        run_server(world.config, world.grid, tmp_path / "run")


def test_ctrl_c_before_the_first_round_after_a_break_loses_nothing(tmp_path, reference):
    world = World(tmp_path / "nodes", *overrides("fedit"), *REFERENCE, *SERVED)

    def interrupt(event):
        if event.kind == "turn" and event.round == 2:
            raise KeyboardInterrupt

    first = run_server(world.config, world.grid, tmp_path / "run", interrupt)
    assert first.summary["interrupted"] and first.summary["rounds"] == 2
    kept = (tmp_path / "run" / "shared.safetensors").read_bytes()
    run_server(world.config, world.grid, tmp_path / "run", interrupt)
    assert (tmp_path / "run" / "shared.safetensors").read_bytes() == kept
    last = run_server(world.config, world.grid, tmp_path / "run")
    assert same(last.shared, reference("fedit").shared)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_servers_own_moments_go_on(optimizer, tmp_path):
    own = (*SHORT, f"server.optimizer={optimizer}", "rounds=3")
    world = World(tmp_path / "nodes", *own)
    with pytest.raises(DiedError):
        run_server(world.config, world.grid, tmp_path / "run", dying("turn", 2))
    assert same(run_server(world.config, world.grid, tmp_path / "run").shared, fedlora.run(config(*own)).shared)


def test_a_schedule_over_all_rounds_is_not_made_longer(tmp_path):
    assert config_digest(config("rounds=2").table) == config_digest(config("rounds=4").table)
    linear = [config_digest(config(f"rounds={n}", "training.schedule=linear").table) for n in (2, 4)]
    assert linear[0] != linear[1]


def test_two_runs_never_write_into_one_folder(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    world = World(tmp_path / "nodes", *SHORT, "rounds=2")
    refused = []

    def second(event):
        if event.kind == "round" and not refused:
            with pytest.raises(ConfigError, match="another run writes into") as found:
                run_server(world.config, world.grid, tmp_path / "run")
            refused.append(found)

    assert len(run_server(world.config, world.grid, tmp_path / "run", second).records) == 2
    assert refused


@pytest.mark.parametrize("name", ["fedsa-lora", "fedex-lora"])
def test_a_server_that_goes_on_sends_only_what_parties_lack(name, tmp_path, grid):
    world = World(tmp_path / "nodes", *overrides(name), *REFERENCE, *SERVED)
    with pytest.raises(DiedError):
        run_server(world.config, world.grid, tmp_path / "run", dying("turn", 2))
    run_server(world.config, world.grid, tmp_path / "run")
    lines = [json.loads(line)["bytes"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [r.record["bytes"] for r in grid(name).rounds] and sum(lines[2]["down"].values()) > 0
