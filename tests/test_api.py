"""The public verbs: each takes a path, a dict or a Config, and gives what the command line gives."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fedlora as fl
from fedlora.export.aggregate import AggregationReport
from fedlora.runs.compare import plan_cells
from fedlora.runs.config import to_table
from fedlora.runs.folder import RunFolder
from fedlora.runs.plan.plan import plan_run
from fedlora.runs.run import Result
from fedlora.schema import ConfigError, dumps
from tests.fixtures.federation import TABLE, same

MINE = {**TABLE, "rounds": 1, "method": {"weighting": "uniform"}, "compare": {"half": {"method": {"name": "fedrot-lora", "strength": 0.5}}}}  # fmt: skip


def planned(config, labels):
    """The runs of a comparison, before they run."""
    return plan_cells(to_table(config), labels, [0], None)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "mine.toml"
    path.write_text(dumps(MINE))
    return path


def forms(mine):
    """The same configuration in every form that a verb takes."""
    return [mine, str(mine), MINE, fl.read(mine)]


@pytest.fixture(scope="module")
def done(mine, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("done") / "run"
    fl.run(mine, folder)
    return folder


@pytest.fixture(scope="module")
def personal(mine, tmp_path_factory):
    """The folder of a run whose clients have models of their own."""
    folder = tmp_path_factory.mktemp("personal") / "run"
    fl.run(mine, folder, overrides=["method.name=fedsa-lora"])
    return folder


def test_run_takes_every_form(mine):
    first, *others = [fl.run(config, overrides=["rounds=2"]) for config in forms(mine)]
    assert first.summary["rounds"] == 2
    assert all(
        same(first.shared, other.shared) and first.summary["final"] == other.summary["final"] for other in others
    )
    assert not same(fl.run(mine, overrides={"rounds": 2, "method.weighting": "examples"}).shared, first.shared)


def test_compare_takes_every_form(mine, tmp_path):
    labels = ["fedit", "half", "ravan", "centralised"]
    first, *others = [fl.compare(c, labels, out=tmp_path / str(i)) for i, c in enumerate(forms(mine))]
    assert [row["method"] for row in first.rows] == labels == list(first.frame()["method"])
    for other in others:
        assert [cell.table for cell in other] == [cell.table for cell in first]
        assert [cell.summary["final"] for cell in other] == [cell.summary["final"] for cell in first]
    assert "<table" in first._repr_html_()
    run = fl.run({**MINE, "seed": 0})
    assert run.summary["final"] == first[0].summary["final"], "the table's own method keeps its settings"


@pytest.mark.parametrize("name", fl.methods.names())
def test_compare_runs_each_method_as_run_does(name):
    table = {key: value for key, value in TABLE.items() if key != "adapter"} | {"method": {"name": name}}
    config = fl.build(table)
    for form in (table, config):
        (cell,) = planned(form, [name])
        assert fl.build(cell.table).table == config.table


def test_a_centralised_run_has_nobody_to_attack_or_to_hide_among():
    table = {
        **TABLE, "clients": {"count": 6}, "attack": {"name": "sign-flip", "clients": [5]}, "robust": {"name": "krum"},
        "flower": {"min_clients": 3},
    }  # fmt: skip
    (cell,) = planned(table, ["centralised"])
    assert not {"attack", "robust"} & cell.table.keys() and cell.table["flower"] == {"min_clients": 3}
    secure = {**TABLE, "flower": {"secure_aggregation": True, "secure_threshold": 2}}
    assert fl.build(planned(secure, ["centralised"])[0].table).flower.secure_aggregation is False


def test_compare_calls_back_from_each_run_or_says_why_not(mine):
    rounds = []

    class Count(fl.Callback):
        def on_round(self, record):
            rounds.append(record["round"])

    fl.compare(mine, ["fedit", "local"], overrides={"rounds": 2}, callbacks=[Count()])
    assert rounds == [1, 2, 1, 2]
    with pytest.raises(ConfigError, match="callbacks run in this process, but jobs is 2; set it to 1"):
        fl.compare(mine, ["fedit"], jobs=2, callbacks=[Count()])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"methods": "fedit"}, r"methods is 'fedit'; it should be a list of at least one, e.g. \["),
        ({"methods": []}, r"methods is \[\]; it should be a list"),
        ({"methods": [fl.methods.load("fedit")()]}, r"methods is \[FedIT\(.*; it should be a list"),
        ({"seeds": 3}, r"seeds is 3; it should be a list of at least one, e.g. \[0, 1, 2\]"),
        ({"seeds": ["1"]}, r"seeds is \['1'\]; it should be a list"),
        ({"overrides": {"privacy": "client"}}, r"privacy is 'client'; it is a table, e.g. \[privacy\]"),
        ({"overrides": {"adapter": "lora"}}, r"adapter is 'lora'; it is a table, e.g. \[adapter\]"),
        ({"methods": ["fedti"]}, "there is no method 'fedti'; did you mean 'fedit'"),
        ({"overrides": {"compare.half": 3}}, "compare.half is 3; it is a table of settings"),
        ({"overrides": {"method": "fedit"}}, r"method is 'fedit'; it is a table, e.g. \[method\]"),
    ],
)
def test_mistakes_of_a_comparison_are_one_sentence(mine, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        fl.compare(mine, **{"methods": ["fedit", "half"], **arguments})


def test_without_methods_a_comparison_is_of_the_configurations_own(mine):
    (cell,) = fl.compare(mine)
    assert (cell.label, cell.seed) == ("fedit", 0)


def test_an_open_run_has_records_frames_exports_and_reports(done, tmp_path):
    pytest.importorskip("peft")
    run = fl.open(done)
    assert run.records == RunFolder(done).records and list(run.frame().index) == [1]
    assert run.config.table == fl.read(done / "config.toml").table
    assert run.summary["rounds"] == 1 and "<table" in run._repr_html_()
    found = run.export(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists() and found["difference"] < 1e-3
    assert run.export(tmp_path / "less", rank=1)["ranks"] == [1]
    assert run.export(tmp_path / "whole", merged=True)["folder"] == str(tmp_path / "whole")
    page = run.report(tmp_path / "mine.html")
    assert page == tmp_path / "mine.html" and "<table" in page.read_text(encoding="utf-8")


def test_an_open_run_exports_a_clients_own_model(personal, tmp_path):
    pytest.importorskip("peft")
    run = fl.open(str(personal))
    assert run.export(tmp_path / "own", client=1)["client"] == 1
    with pytest.raises(ConfigError, match="ends with a model for each client and none for all"):
        run.export(tmp_path / "shared")
    with pytest.raises(ConfigError, match="there is no client 7"):
        run.export(tmp_path / "seven", client=7)


def test_an_open_run_is_resumed_to_the_bits_of_a_whole_one(mine, done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    run = fl.open(tmp_path / "run")
    assert len(run.records) == 1 and run.summary["rounds"] == 1
    result = run.resume(rounds=2)
    assert isinstance(result, Result) and same(result.shared, fl.run(mine, overrides={"rounds": 2}).shared)
    assert len(run.records) == run.summary["rounds"] == 2, "nothing of before is kept"
    assert same(run.shared, result.shared)
    with pytest.raises(ConfigError, match="holds a finished run of 2 rounds"):
        run.resume()


def test_a_run_that_was_killed_is_opened_and_resumed(done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    run = fl.open(tmp_path / "run")
    assert "broken off" in run._repr_html_() and len(run.records) == 1
    with pytest.raises(ValueError, match="holds no finished run"):
        run.export(tmp_path / "adapter")
    assert run.resume(rounds=2).summary["rounds"] == 2


def test_a_comparisons_folder_opens_as_a_comparison_wherever_it_lies(mine, tmp_path):
    ran = fl.compare(mine, ["fedit", "local"], seeds=[0, 1], out=tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    found = fl.open(tmp_path / "moved")
    assert found.rows == ran.rows and found._repr_html_() == ran._repr_html_()
    assert list(found.frame()["clients"]) == list(ran.frame()["clients"])
    assert all(Path(cell.folder).is_dir() and fl.open(cell.folder).records for cell in found)
    assert "fedit" in found.report(tmp_path / "c.html").read_text(encoding="utf-8")


def test_other_folders_are_not_opened(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="holds no run: it has no config.toml; name a folder that fedlora.run"):
            fl.open(folder)


def test_a_plan_takes_every_form_and_has_the_figures_of_the_command(mine, done):
    first, *others = [fl.plan(config) for config in forms(mine)]
    assert all(vars(other) == vars(first) for other in others)
    assert first.memory == plan_run(fl.read(mine))["memory"] and first.memory["one_process"] > first.memory["weights"]
    assert first.bytes["run"] == fl.open(done).summary["bytes"]
    assert first.method == "fedit" and "Memory (estimate), MB" in first._repr_html_()
    private = fl.plan(mine, {"privacy": {"level": "example", "noise_multiplier": 1.0}})
    assert private.privacy and "Privacy of the whole run" in private._repr_html_()
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        fl.plan(mine, ["rouns=3"])


def test_a_sweep_takes_every_form(mine, tmp_path):
    space = {"training.learning_rate": [1e-3, 5e-3], "training.local_steps": 1}
    first, *others = [fl.sweep(config, space) for config in forms(mine)]
    assert [trial["value"] for trial in first.report["methods"][0]["trials"]] == list(first.frame()["value"])
    assert all(
        other.best == first.best and list(other.frame()["value"]) == list(first.frame()["value"]) for other in others
    )
    assert first.folder is None and "<table" in first._repr_html_()
    (best,) = first.best["fedit"].values()
    assert best in (1e-3, 5e-3)
    values = np.array([1e-3, 5e-3])
    assert fl.sweep(mine, {"training.learning_rate": values, "training.local_steps": 1}).best == first.best
    kept = fl.sweep(mine, ["training.learning_rate=1e-3,5e-3", "training.local_steps=1"], out=tmp_path / "sweep")
    assert kept.best == first.best and fl.open(tmp_path / "sweep").best == first.best
    (cell,) = fl.compare(kept.table, ["fedit"])
    assert cell.table["training"]["learning_rate"] == best and cell.table["training"]["local_steps"] == 1


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({}, "the sweep has no values to try"),
        ("training.learning_rate=1,2", r"write them as a list, e.g. \['training.learning_rate=1,2'\], or a dict"),
        ({"rounds": [1]}, "the sweep has no values to try"),
        ({"training.learning_rate": []}, r"the values of training.learning_rate are \[\]; name at least one"),
        ({"training.learning_rate": [1.0, 1.0]}, "one of them stands there twice"),
        ({"seed": [1, 2]}, "seed cannot be swept; set it with --seeds"),
        ({"training.learning_rate": "1e-4:1e-3:log"}, "training.learning_rate is a range; say how many values"),
        ({"training.learning_rat": [1e-3, 1e-2]}, "did you mean 'learning_rate'"),
    ],
)
def test_mistakes_of_a_sweep_are_one_sentence(mine, space, sentence):
    with pytest.raises(ConfigError, match=sentence):
        fl.sweep(mine, space)


@pytest.fixture(scope="module")
def adapters(mine, tmp_path_factory):
    """Two exported adapters."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    for seed in (0, 1):
        fl.run(mine, folder / f"run-{seed}", overrides={"seed": seed})
        fl.open(folder / f"run-{seed}").export(folder / f"a{seed}")
    return [folder / "a0", str(folder / "a1")]


def test_aggregate_combines_adapters_and_has_the_errors(adapters, tmp_path):
    report = fl.aggregate(adapters, out=tmp_path / "merged", method="svd", weights=[3, 1])
    assert isinstance(report, AggregationReport) and len(report.errors) == 4
    assert all(0 <= error < 1 for error in report.errors.values())
    assert report.total("served") == report.as_table()["error"] and report.folder == tmp_path / "merged"
    assert "2 adapters combined" in report._repr_html_()
    exact = fl.aggregate(adapters, tmp_path / "exact", exact=True)
    assert exact.method == "flora" and max(exact.errors.values()) < 1e-5
    named = fl.aggregate(adapters, tmp_path / "named", "svd", rank=2, settings={"weighting": "uniform"})
    made = fl.aggregate(adapters, tmp_path / "made", fl.methods.load("svd")(weighting="uniform"), rank=2)
    assert named.errors == made.errors and named.ranks == made.ranks == {2}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"adapters": "a"}, r"adapters is 'a'; it is a list of folders, e.g. \['a'\]"),
        ({"method": "ravan"}, "'ravan' cannot be applied to finished adapters"),
        ({"method": fl.methods.load("ravan")()}, "Ravan cannot be applied to finished adapters"),
        ({"method": 3}, "method is 3; it should be a name"),
        (
            {"method": fl.methods.load("svd")(), "settings": ["weighting=uniform"]},
            "the method is an object; set them there",
        ),
        ({"weights": [1.0]}, "there are 1 weights for 2 adapters"),
        ({"settings": {"wieghting": "uniform"}}, "did you mean 'weighting'"),
    ],
)
def test_mistakes_of_an_aggregation_are_one_sentence(adapters, tmp_path, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        fl.aggregate(**{"adapters": adapters, "out": tmp_path / "merged", **arguments})
    assert not (tmp_path / "merged").exists()


def test_plug_ins_are_listed_and_loaded_by_name():
    for module in ("adapters", "attacks", "methods", "partitioners", "robust", "tasks", "trackers"):
        kinds = getattr(fl, module)
        assert kinds.names() and all(isinstance(kinds.load(name), type) for name in kinds.names())
        with pytest.raises(ValueError, match="there is no .* 'nothing'"):
            kinds.load("nothing")
    assert fl.methods.load("fedsa-lora")(fl.LoRA(rank=3)).adapter.rank == 3


def test_the_command_line_gives_the_same(mine, adapters, commands, tmp_path):
    asked = ["fedlora", "aggregate", *map(str, adapters), "--out", str(tmp_path / "m"), "--weights", "3,1", "--json"]
    found = json.loads(commands.call(asked, tmp_path).stdout)
    report = fl.aggregate(adapters, tmp_path / "n", weights=[3, 1])
    assert found == {**report.as_table(), "folder": str(tmp_path / "m")}
    assert torch.tensor(list(report.errors.values())).isfinite().all()
