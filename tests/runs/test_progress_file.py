"""Callbacks, trackers and the progress file of a run over a Flower grid: on the server's side, and as in one process."""

import json

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import fedlora
from fedlora.flower.serve import run_server
from fedlora.runs.progress_file import ProgressReader
from tests.fixtures import trackers as reading
from tests.fixtures.callbacks import Notes
from tests.fixtures.flower import World, config

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ("rounds=2", "flower.poll=0.001", "flower.join_timeout=2.0", "track.tensorboard=true")


def test_a_grid_tells_as_one_process_does(tmp_path):
    here, there, seen = Notes(), Notes(), []
    fedlora.run(config(*QUICK), tmp_path / "here", callbacks=[here])
    world = World(tmp_path / "nodes", *QUICK)

    class Looks:
        def on_round(self, record):
            at = ProgressReader(tmp_path / "run").read()
            seen.append((at.state, at.progress["title"], len(at.records)))

    run_server(world.config, world.grid, tmp_path / "run", callbacks=[there, Looks()])
    wanted = ("start", "on_round", "on_evaluation", "end", "round", "evaluation")
    assert [x for x in there.seen if x[0] in wanted] == [x for x in here.seen if x[0] in wanted]
    turns = [sorted(x for x in one.seen if x[0] == "turn") for one in (here, there)]
    assert turns[0] == turns[1] and len(turns[0]) == 6
    assert seen == [("running", "FedIT", 1), ("running", "FedIT", 2)]
    assert ProgressReader(tmp_path / "run").read().state == "finished"
    boards = [reading.tensorboard(tmp_path / name / "tensorboard") for name in ("here", "run")]
    for name in ("clients/mean", "train/loss", "bytes_up/total", "aggregation/served"):
        assert boards[0][name] == pytest.approx(boards[1][name])


def test_who_left_is_a_fault_and_shown(tmp_path):
    heard = []

    class Faults:
        def on_fault(self, event):
            heard.append((event.kind, event.client))

        def on_round(self, record):
            if record["round"] == 1:
                world.grid.leave(11)

    world = World(tmp_path / "nodes", *QUICK[:3])
    run_server(world.config, world.grid, tmp_path / "run", callbacks=[Faults()])
    assert ("absent", 1) in heard
    assert any("client 1" in text for text in json.loads((tmp_path / "run" / "progress.json").read_text())["said"])
