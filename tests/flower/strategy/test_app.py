"""The before and the after of a Flower and PEFT project: how many lines, and that both run."""

import difflib
import random
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")
pytest.importorskip("peft", reason="needs the peft extra")

from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from tests.fixtures.flower_strategy import three
from tests.fixtures.memory_grid import MemoryGrid
from tests.flower.flowertune_app.after import client_app as client_after
from tests.flower.flowertune_app.after import server_app as server_after
from tests.flower.flowertune_app.before import client_app as client_before
from tests.flower.flowertune_app.before import server_app as server_before

pytestmark = pytest.mark.xdist_group("drop-in apps")  # they compare each other's runs
APP = Path(__file__).parents[1] / "flowertune_app"
METHODS = [
    "fedit", "ffa-lora", "rolora", "fedsa-lora", "fedex-lora", "flora", "flora-na", "fedrot-lora", "svd", "flexlora",
    "lora-fair", "hetlora", "local",
]  # fmt: skip


def changed(name):
    """Lines of the after that are not in the before, or the other way round, whichever are more."""
    before, after = ((APP / side / name).read_text().splitlines() for side in ("before", "after"))
    marks = [line[0] for line in difflib.ndiff(before, after)]
    return max(marks.count("+"), marks.count("-"))


@pytest.fixture(scope="module")
def federate(tmp_path_factory):
    """``federate(server, client, method)``: what two rounds of these apps leave, run once."""
    folder, ends = tmp_path_factory.mktemp("apps"), {}

    def run(server, client, method="fedit"):
        key = (server.__name__, client.__name__, method)
        if key not in ends:
            random.seed(0)  # Flower samples nodes with it, and adds in the order that it finds
            path = folder / f"{len(ends)}.safetensors"
            run_config = {
                "fraction-train": 1.0, "num-server-rounds": 2, "learning-rate": 2.0, "method": method,
                "save-path": str(path),
            }  # fmt: skip
            server.app(MemoryGrid(client.app, three()), Context(1, 1, {}, RecordDict(), run_config, series_id=1))
            ends[key] = load_file(path)
        return ends[key]

    return run


def test_five_lines_of_the_client_and_four_of_the_server_change():
    assert changed("client_app.py") <= 5
    assert changed("server_app.py") <= 4


@pytest.mark.parametrize("name", ["client_app.py", "server_app.py"])
def test_the_manual_shows_the_difference_as_it_is(name):
    before, after = ((APP / side / name).read_text().splitlines() for side in ("before", "after"))
    shown = "\n".join(list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:])
    assert shown in (APP.parents[2] / "docs" / "flower-drop-in.md").read_text()


def test_fedit_is_flowers_own_average(federate):
    before = federate(server_before, client_before)
    after = federate(server_after, client_after)
    assert before.keys() == after.keys()
    for key, x in before.items():
        assert float((x - after[key]).abs().max()) <= 1e-7, key


@pytest.mark.parametrize("method", METHODS)
def test_the_app_runs_with_every_method(method, federate):
    found = federate(server_after, client_after, method)
    assert all(bool(x.isfinite().all()) for x in found.values())


@pytest.mark.parametrize("method", ["flora-na", "svd", "flexlora", "lora-fair"])
def test_methods_of_the_server_alone_need_no_change_of_the_client(method, federate):
    alone = federate(server_after, client_before, method)
    both = federate(server_after, client_after, method)
    for key, x in alone.items():
        assert float((x - both[key]).abs().max()) <= 1e-6, key


def test_the_new_client_does_what_the_old_one_did_under_flowers_strategy(federate):
    old = federate(server_before, client_before)
    new = federate(server_before, client_after)
    assert all(bool((x == new[key]).all()) for key, x in old.items())
