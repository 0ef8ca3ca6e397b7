"""Plug-ins of another package, one of each kind, in runs: by entry point and by ``package.module:Class``."""

import csv
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import fedlora
from fedlora.export.peft import export_model
from fedlora.reporting.citations import collect_citations
from fedlora.reporting.method_catalog import describe_method
from fedlora.runs.config import Config, build, read
from fedlora.runs.folder import RunFolder
from fedlora.runs.plan.plan import plan_run
from fedlora.runs.sections import ModelTable
from fedlora.schema import ConfigError
from tests.fixtures.federation import TABLE, TINY_VIT, same
from tests.fixtures.plugins import NAMES, PATHS, importable, installed  # noqa: F401
from tests.fixtures.toml import TOML

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
# How a file names one plug-in, and where the configuration has it. ``NAME`` stands for its name.
PLACES = {
    "method": ('[method]\nname = "NAME"', lambda config: config.method),
    "adapter": ('[method]\nname = "METHOD"\n[adapter]\nname = "NAME"', lambda config: config.method.adapter),
    "task": ('[task]\nname = "NAME"', lambda config: config.task),
    "partitioner": ('[clients]\ncount = 2\npartition = { name = "NAME" }', lambda config: config.clients.partitioner),
    "partitioner as a name": ('[clients]\ncount = 2\npartition = "NAME"', lambda config: config.clients.partitioner),
    "codec": ('[compression]\nup = "NAME"', lambda config: config.compression.upward.stages[-1]),
    "codec in a list": (
        '[compression]\ntop_k = 0.1\nup = ["top-k", "NAME"]',
        lambda config: config.compression.upward.stages[-1],
    ),
    "codec of downloads": ('[compression]\ndown = "NAME"', lambda config: config.compression.downward.stages[-1]),
    "attack": ('[attack]\nname = "NAME"\nclients = [1]', lambda config: config.attack),
    "robust": ('[robust]\nname = "NAME"', lambda config: config.robust),
    "tracker": ('[track]\n"NAME" = true', lambda config: next(iter(config.track.trackers.values()))),
    "engine": ('[engine]\nname = "NAME"', lambda config: config.engine.name),
}


@pytest.fixture(params=["installed", "importable"])
def names(request):
    """What a configuration calls each class, with the package on the path."""
    return request.getfixturevalue(request.param)


def table(names, rounds=2):
    """A configuration that uses all nine."""
    return {
        "rounds": rounds,
        "model": {"name": str(TINY_VIT)},
        "task": {"name": names["task"]},
        "method": {"name": names["method"], "step": 0.75},
        "adapter": {"name": names["adapter"], "rank": 3},
        "clients": {"count": 5, "partition": {"name": names["partitioner"], "first": 0}},
        "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 1e-2},
        "compression": {"up": names["codec"]},
        "attack": {"name": names["attack"], "clients": [1]},
        "robust": {"name": names["robust"]},
        "track": {names["tracker"]: True},
        "engine": {"name": names["engine"]},
    }


def write_file(path, names, place):
    """A file that names one plug-in, and the configuration of the tests besides."""
    text = PLACES[place][0].replace("NAME", names[place.split()[0]]).replace("METHOD", names["method"])
    own = tomllib.loads(text)
    rest = [f"[{part}" for part in TOML.split("\n[")[1:] if part.partition("]")[0] not in own]
    path.write_text("\n".join(["rounds = 1", *rest, text]))
    return path


@pytest.mark.parametrize("place", PLACES)
def test_a_file_names_one(names, place, tmp_path):
    kind, found = place.split()[0], PLACES[place][1](read(write_file(tmp_path / "mine.toml", names, place)))
    assert found == names[kind] if kind == "engine" else type(found).__name__ == PATHS[kind].partition(":")[2]


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_names_none_is_refused(names, place, tmp_path):
    wrong = {**names, place.split()[0]: "example_plugins:Missing"}
    with pytest.raises((ConfigError, ValueError), match="'example_plugins:Missing' could not be loaded"):
        read(write_file(tmp_path / "mine.toml", wrong, place))


def test_the_page_names_one_of_each(importable):  # noqa: F811
    block = PAGE.read_text(encoding="utf-8").partition("# plugins.toml\n")[2].partition("```")[0]
    config = build(tomllib.loads(block))
    kinds = {kind: type(PLACES[kind][1](config)).__name__ for kind in NAMES if kind != "engine"}
    assert kinds == {kind: PATHS[kind].partition(":")[2] for kind in kinds}
    assert config.engine.name == PATHS["engine"] and build(config.table).table == config.table


def test_a_run_with_one_of_each(names, tmp_path):
    notes = []
    config = build(table(names))
    run = fedlora.run(config, tmp_path / "run", watch=lambda e: notes.append(e.text) if e.kind == "note" else None)
    assert type(config.method).__name__ == "Damped" and config.method.step == 0.75
    assert all(layer.keys() == {"A", "B", "d"} for part, layer in run.shared.items() if "classifier" not in part)
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert rows["labels"] == ["horizontal", "vertical"] and {c["train"] for c in rows["clients"].values()} == {18}
    numbers = sum(x.numel() for part, layer in run.shared.items() for leaf, x in layer.items() if leaf not in "AB")
    floats = sum(len(layer) - 2 * ("d" in layer) for layer in run.shared.values())
    assert sum(run.records[0]["bytes"]["up"].values()) == 5 * (2 * numbers + 4 * floats), (
        "two bytes a number, a scale a leaf"
    )
    assert all(1 in record["robust"]["kept"] and len(record["robust"]["kept"]) == 4 for record in run.records)
    lines = list(csv.reader((tmp_path / "run" / "figures.csv").open()))
    assert {line[0] for line in lines} == {"1", "2"} and [x[1] for x in lines if x[1] == "train/clients"] == [
        "train/clients"
    ] * 2
    assert notes.count("round 1: 5 clients") == 1


def test_its_folder_repeats_and_goes_on(names, tmp_path):
    whole = fedlora.run(build(table(names, rounds=3)), tmp_path / "whole")
    written = read(tmp_path / "whole" / "config.toml")
    sections = {k: written.table[k]["name"] for k in ("task", "method", "adapter", "attack", "robust", "engine")}
    assert sections == {key: names[key] for key in sections}
    assert written.table["clients"]["partition"] == {"name": names["partitioner"], "first": 0}
    assert written.table["compression"]["up"] == names["codec"] and list(written.table["track"]) == [names["tracker"]]
    fedlora.run(replace(written, rounds=1), tmp_path / "run")
    again = fedlora.resume(tmp_path / "run", rounds=3)
    assert same(again.shared, whole.shared)


def test_settings_of_python_are_written_with_their_names(installed):  # noqa: F811
    from example_plugins.adapter import FrozenPair
    from example_plugins.method import Damped
    from example_plugins.task import Bars

    config = Config(ModelTable(str(TINY_VIT)), Bars(), Damped(FrozenPair(2)))
    assert {k: config.table[k]["name"] for k in ("task", "method", "adapter")} == {
        "task": "bars", "method": "damped", "adapter": "frozen-pair",
    }  # fmt: skip
    assert build(config.table).table == config.table


def test_a_method_takes_its_own_adapter_and_a_comparison_fits_one(names):
    with pytest.raises(
        ValueError, match=f"'fedit' is not defined for adapter.name = '{names['adapter']}'; set it to 'lora'"
    ):
        build({**table(names), "method": {"name": "fedit"}})
    found = fedlora.compare(
        {**TABLE, "rounds": 1, "adapter": {"name": names["adapter"], "rank": 2}}, [names["method"], "fedit"]
    )
    assert [cell.table["adapter"]["name"] for cell in found] == [names["adapter"], "lora"]
    assert [cell.table["adapter"].get("rank") for cell in found] == [2, 8]


def test_plan_export_methods_and_cite_take_them(names, tmp_path):
    pytest.importorskip("peft")
    own = table(names, rounds=1)
    config = build({**own, "engine": {"name": "inprocess"}})
    run = fedlora.run(config, tmp_path / "run")
    assert plan_run(config)["bytes"]["run"] == run.summary["bytes"]
    found = export_model(RunFolder.open(tmp_path / "run"), tmp_path / "adapter")
    assert found["ranks"] == [3] and found["difference"] < 1e-5
    assert describe_method(names["method"])["title"] == "Damped" and describe_method(names["method"])["adapters"] == [
        "LoRA",
        "FrozenPair",
    ]
    assert [e.key for e in collect_citations(names["method"])] == ["fedlora"] and "fedlora" in [
        e.key for e in collect_citations(tmp_path / "run")
    ]
