"""How alike clients' factors are, against pairs taken one by one."""

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from fedlora.api import run
from fedlora.cli import app
from fedlora.reporting.similarity import measure_similarity
from fedlora.runs.build import attach_adapters
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.schema import ConfigError

TABLE = {
    "rounds": 1,
    "model": {"name": "demo-vit"},
    "task": {"name": "image-classification", "data": "digits", "train_rows": 120, "test_rows": 60},
    "clients": {"count": 3},
    "method": {"name": "local"},
    "adapter": {"name": "lora", "rank": 2},
    "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("similarity") / "run"
    run(build(TABLE), place)
    return place


def test_figures_are_those_of_the_pairs(folder):
    (found, _), opened = measure_similarity(folder), RunFolder.open(folder)
    start = attach_adapters(opened.config, opened.network()).initial(0)
    trees = [opened.tree(client) for client in range(3)]
    assert len(found) == sum("A" in layer for layer in opened.shared.values())
    pairs = [(0, 1), (0, 2), (1, 2)]
    for part, row in found.items():
        for name, leaf, base in (("A", "A", 0.0), ("B", "B", 0.0), ("A change", "A", start[part]["A"].double())):
            x = [tree[part][leaf].double() - base for tree in trees]
            each = [float(cosine_similarity(x[i].flatten(), x[j].flatten(), dim=0)) for i, j in pairs]
            assert row[name] == pytest.approx(sum(each) / 3, abs=1e-9)
        bases = [torch.linalg.svd(tree[part]["B"].double(), full_matrices=False).U for tree in trees]
        angles = [torch.linalg.svdvals(bases[i].T @ bases[j]).clamp(max=1).acos().rad2deg().mean() for i, j in pairs]
        assert row["B angle"] == pytest.approx(float(sum(angles)) / 3, abs=1e-4)
        assert row["A"] > 0.9 > row["A change"]  # one start for all: alike before anything is learnt


def test_the_command(folder):
    shown = CliRunner().invoke(app, ["similarity", str(folder), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["mean"] == measure_similarity(folder)[1]
    assert "A change" in CliRunner().invoke(app, ["similarity", str(folder)]).stdout


def test_a_shared_model_has_no_similarity(reference):
    with pytest.raises(ConfigError, match="all hold the shared model"):
        measure_similarity(reference("fedit").folder)
