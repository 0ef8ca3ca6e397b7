"""A run means the same from any folder, and a comparison or a sweep that was broken off goes on with the same data."""

import json
import shutil
from dataclasses import replace

import pytest

import fedlora
from fedlora.api import compare
from fedlora.runs.sweep import Sweep
from tests.fixtures.federation import TINY_VIT, config
from tests.fixtures.own_files import ROWS, write
from tests.fixtures.resume import alike, breaking, stopped


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data and a model, in which the test is."""
    write(tmp_path / "begun" / "data", ROWS, ROWS[:30])
    shutil.copytree(TINY_VIT, tmp_path / "begun" / "model")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    return tmp_path


def relative(*more):
    """A configuration with relative paths."""
    return config(
        "task={name='image-classification', data='data', image_shape=[8, 8, 1]}", "model.name=model",
        "training.local_steps=1", "clients.partition={name='iid'}", "rounds=3", *more,
    )  # fmt: skip


def test_relative_paths_resumed_from_another_folder(place, monkeypatch):
    fedlora.run(relative(), "whole")
    stopped(relative(), "run", 1)
    monkeypatch.chdir(place / "other")
    fedlora.resume(place / "begun" / "run")
    assert alike(place / "begun" / "run", place / "begun" / "whole")


def test_data_and_model_that_were_moved(place, monkeypatch):
    fedlora.run(relative(), "whole")
    stopped(relative(), "run", 1)
    shutil.move("data", place / "other" / "rows")
    with pytest.raises(ValueError, match=f"there is no data at '{place}/begun/data'"):
        fedlora.resume("run")
    fedlora.resume("run", overrides=[f"task.data={place}/other/rows"])
    assert alike(place / "begun" / "run", place / "begun" / "whole")


def test_a_model_that_was_moved_keeps_the_rest_of_its_table(place):
    own = relative("model.targets=['q_proj']", "model.head=['classifier']", "model.overlay=true")
    fedlora.run(own, "whole")
    stopped(own, "run", 1)
    shutil.move("model", place / "other" / "vit")
    fedlora.resume("run", overrides=[f"model.name={place}/other/vit"])
    assert fedlora.read("run/config.toml").model == replace(own.model, name=str(place / "other" / "vit"))
    assert alike(place / "begun" / "run", place / "begun" / "whole")


def test_names_that_ship_with_the_library_stay(place):
    (place / "begun" / "digits").mkdir()
    fedlora.run(config("rounds=1", "training.local_steps=1"), "run")
    assert fedlora.read("run/config.toml").task.data == "digits"


def table():
    """A comparison's table."""
    return relative().table | {"method": {"name": "fedit"}}


def test_a_comparison_goes_on(place):
    whole = compare(table(), ["fedit", "local", "ffa-lora"], out="whole")

    def second(cell, event):
        if cell.label == "local":
            breaking(event, 1, "turn")

    with pytest.raises(KeyboardInterrupt):
        compare(table(), ["fedit", "local", "ffa-lora"], out="c", watch=second)
    with pytest.raises(
        ValueError, match=r"'c' is not a run; it contains 2 runs, such as 'c/fedit-seed0'. .* with --out c"
    ):
        fedlora.resume("c")
    before = (place / "begun" / "c" / "fedit-seed0" / "metrics.jsonl").stat().st_mtime_ns
    trained = []
    cells = compare(
        table(), ["fedit", "local", "ffa-lora"], out="c", watch=lambda cell, event: trained.append(cell.label)
    )
    assert set(trained) == {"local", "ffa-lora"}, "what is finished is not run again"
    assert (place / "begun" / "c" / "fedit-seed0" / "metrics.jsonl").stat().st_mtime_ns == before
    for label in ("fedit", "local", "ffa-lora"):
        assert alike(place / "begun" / "c" / f"{label}-seed0", place / "begun" / "whole" / f"{label}-seed0")
    assert [cell.summary["final"] for cell in cells] == [cell.summary["final"] for cell in whole]


def test_a_comparison_does_not_go_on_with_other_data_or_settings(place):
    compare(table(), ["fedit"], out="c")
    (place / "begun" / "c" / "comparison.json").unlink()
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        compare({**table(), "training": {"local_steps": 2}}, ["fedit", "local"], out="c")
    write(place / "begun" / "data", [*ROWS, ROWS[0]], ROWS[:30])
    with pytest.raises(ValueError, match="there are 61 training rows, and were 60"):
        compare(table(), ["fedit", "local"], out="c")
    assert not (place / "begun" / "c" / "comparison.json").exists()


def test_a_sweep_does_not_go_on_with_other_data(place):
    planned = Sweep.plan(table(), ["training.learning_rate=1e-3,1e-2"], holdout=0.2)
    planned.run("s")
    found = json.loads((place / "begun" / "s" / "sweep.json").read_text())
    found["runs"].popitem()
    (place / "begun" / "s" / "sweep.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="'s' is not a run; it contains 2 runs"):
        fedlora.resume("s")
    write(place / "begun" / "data", [*ROWS[1:], ROWS[0]], ROWS[:30])
    with pytest.raises(ValueError, match="was begun with other data"):
        planned.run("s")
    write(place / "begun" / "data", ROWS, ROWS[:30])
    assert planned.run("s")["finished"]
