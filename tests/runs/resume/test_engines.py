"""A run goes on under another engine than it began with: parties' own state is in the checkpoint of both."""

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora.api import run
from fedlora.flower.client import Node, SharedBase
from fedlora.flower.client_messages import build_client_app, handle_message
from fedlora.flower.client_store import ClientStore, LocalClients
from fedlora.flower.server import FlowerLoop
from fedlora.runs.resume import read_resumable
from tests.fixtures.federation import same
from tests.fixtures.flower import QUICK, agree
from tests.fixtures.memory_grid import MemoryGrid
from tests.fixtures.resume import alike, breaking, ledger, lines, small, stopped, trees

METHODS = ["fedit", "fedsa-lora", "fedex-lora", "ravan"]
SETTINGS = ("rounds=4", "training.keep_optimizer=true", "clients.per_round=2", "evaluation.measure=false")


def on_a_grid(settings, folder, nodes, again=False, watch=lambda event: None):
    """What the simulation does, on the grid without processes."""

    def drive(config, f, watch, observe, take):
        store = ClientStore(nodes / "run")
        base = SharedBase(config.federation())

        def turns(kind, content, context):
            return handle_message(kind, content, lambda run: Node(base, int(context.node_config["client"]), store))

        grid = MemoryGrid(build_client_app(turns), {10 + k: {"client": k} for k in range(f.clients.members)})
        engine = FlowerLoop(watch, observe, federation=f, network=QUICK, grid=grid, local=LocalClients(store))
        take(engine, f)
        return {k: own.kept for k, own in engine.client_states(engine.at).items()}

    return run(settings, folder, watch, drive=drive, again=again)


def trained(found):
    """Files by name without the layers that nobody keeps a leaf of."""
    return {name: tree for name, tree in found.items() if tree}


def figures(folder):
    """Records without what an engine counts or measures in its own way."""
    return [{k: v for k, v in line.items() if k not in ("bytes", "weights")} for line in lines(folder)]


def bits(folder, other):
    a, b = trained(trees(folder)), trained(trees(other))
    assert a.keys() == b.keys()
    assert all(same(a[name], b[name]) for name in a)
    assert agree(figures(folder), figures(other))
    return True


@pytest.mark.parametrize("name", METHODS)
def test_from_one_process_to_a_grid_and_back(name, tmp_path):
    settings, path = small(name, *SETTINGS), tmp_path / "run"
    fedlora.run(settings, tmp_path / "whole")
    stopped(settings, path, 1)
    middle = on_a_grid(read_resumable(path), path, tmp_path / "nodes", again=True, watch=lambda e: breaking_turn(e, 3))
    assert middle.summary["rounds"] == 3 and middle.summary["resumed"] == [1]
    fedlora.resume(path)
    assert bits(path, tmp_path / "whole")


@pytest.mark.parametrize("name", METHODS)
def test_a_grid_goes_on_with_the_same_bits_and_the_same_bytes(name, tmp_path):
    """Parties' folders are made anew from the checkpoint, as a simulation's are."""
    settings, path = small(name, *SETTINGS), tmp_path / "run"
    on_a_grid(settings, tmp_path / "whole", tmp_path / "a")
    on_a_grid(settings, path, tmp_path / "b", watch=lambda e: breaking_turn(e, 2))
    on_a_grid(read_resumable(path), path, tmp_path / "c", again=True)
    assert alike(path, tmp_path / "whole")
    assert ledger(path)


def breaking_turn(event, after):
    if event.kind == "turn" and event.round == after:
        raise KeyboardInterrupt


def test_parties_that_keep_their_own_state_are_not_gone_on_with_here(tmp_path):
    settings, path = small("fedsa-lora", "rounds=2"), tmp_path / "run"

    def elsewhere(config, f, watch, observe, take):
        class Away(fedlora.engines.in_process.InProcess):
            def client_states(self, at):
                return None

        take(Away(watch, observe), f)

    run(settings, path, lambda event: breaking(event, 1), drive=elsewhere)
    with pytest.raises(ValueError, match="are on their machines; go on with the engine that ran this"):
        fedlora.resume(path)
