"""Configuration: what it builds, how it is overridden, and one sentence for every mistake."""

import importlib.metadata
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import fedlora
from fedlora.adapters import Dense, LoRA, MultiHead
from fedlora.engines.clients import Clients
from fedlora.methods import METHODS
from fedlora.methods.fedit import FedIT
from fedlora.runs.config import Config, build
from fedlora.runs.sections import ModelTable
from fedlora.schema import ConfigError, apply_overrides, dumps, merge_tables, table_difference
from fedlora.tasks.image_classification import ImageClassification
from fedlora.training.device import Engine
from fedlora.training.local import Training
from tests.fixtures.federation import TINY_VIT

TABLE = {
    "rounds": 2,
    "model": {"name": "demo-vit"},
    "task": {"name": "image-classification", "data": "digits"},
    "clients": {"count": 3},
}


def with_(**overrides):
    return apply_overrides(TABLE, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])


def test_the_resolved_table_builds_the_same_config():
    config = build(with_(method__name='"ravan"', clients__partition='{name = "dirichlet", alpha = 0.3}'))
    again = build(tomllib.loads(dumps(config.table)))
    assert again.table == config.table
    assert config.table["training"]["local_steps"] == 10
    assert config.table["clients"]["partition"] == {"name": "dirichlet", "alpha": 0.3, "min_rows": 2}
    assert config.table["adapter"]["name"] == "multihead", "a method brings the adapter it is defined for"


def test_overrides():
    config = build(
        with_(adapter__rank=3, training__learning_rate="5e-4", method__name="fedrot-lora", method__strength=1)
    )
    assert (config.method.adapter.rank, config.training.learning_rate, config.method.strength) == (3, 5e-4, 1)
    with pytest.raises(ConfigError, match="'rounds' has no '='"):
        apply_overrides(TABLE, ["rounds"])


def test_another_name_starts_its_table_anew():
    table = {"partition": {"name": "dirichlet", "alpha": 0.3}}
    assert merge_tables(table, {"partition": {"name": "iid"}}) == {"partition": {"name": "iid"}}
    assert merge_tables(table, {"partition": {"alpha": 1.0}}) == {"partition": {"name": "dirichlet", "alpha": 1.0}}


def test_another_model_or_engine_keeps_the_rest_of_its_table():
    """Their names are values like any other: no key depends on them."""
    own = {"name": "a", "targets": ["q"], "head": [], "start": "s", "overlay": True}
    engine = {"name": "inprocess", "threads": 1, "device": "cpu", "offload": True}
    table = {"model": own, "engine": engine, "method": {"name": "fedit", "weighting": "uniform"}}
    found = apply_overrides(table, ["model.name=b", "engine.name=flower-simulation", "method.name=fedsa-lora"])
    assert found == {
        "model": {**own, "name": "b"},
        "engine": {**engine, "name": "flower-simulation"},
        "method": {"name": "fedsa-lora"},
    }
    laid = {"model": {"name": "b"}, "engine": {"name": "flower-simulation"}, "method": {"name": "fedsa-lora"}}
    assert table_difference(found, table) == laid and merge_tables(table, laid) == found


def installed(folder, package):
    """A package on the path that brings a method ``mean``, its title the package's name."""
    (folder / f"{package}.py").write_text(
        f"from fedlora.methods.fedit import FedIT\n\nclass Averaging(FedIT):\n    title = '{package.capitalize()}'\n"
    )
    notes = folder / f"{package}-1.0.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (notes / "entry_points.txt").write_text(f"[fedlora.methods]\nmean = {package}:Averaging\n")
    return folder


def test_a_method_of_an_installed_package_is_one_of_the_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no method 'mean'"):
        build(with_(method__name="mean"))
    # its entry points are read although those of before are remembered
    monkeypatch.syspath_prepend(installed(tmp_path, "averaging"))
    assert "mean" in METHODS.names()
    assert build(with_(method__name="mean")).method.title == "Averaging"


def test_of_two_packages_with_a_method_of_one_name_the_first_on_the_path_stands(tmp_path, monkeypatch):
    for package in ("averaging_later", "averaging_first"):
        (tmp_path / package).mkdir()
        monkeypatch.syspath_prepend(installed(tmp_path / package, package))
    assert build(with_(method__name="mean")).method.title == "Averaging_first"


def test_installed_packages_are_read_once(monkeypatch):
    """Reading them took two thirds of a small comparison, as each configuration asked for every method."""
    read = []
    everything = importlib.metadata.entry_points()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: read.append(True) or everything)
    monkeypatch.setattr(sys, "path", [*sys.path, "a path of this test"])  # nothing is remembered of it
    for _ in range(3):
        build(with_())
    assert read == [True]


MISTAKES = {
    "unknown method": (with_(method__name="fedrot"), r"no method 'fedrot'; did you mean 'fedrot-lora'"),
    "unknown key": (with_(training__learning_rat=1), r"no setting 'training.learning_rat'; did you mean 'learning_rate'"),
    "experts of a mixture": (
        with_(model__target_parameters="['experts.gate_up_proj']"),
        r"model.target_parameters is a setting of PEFT that cannot be used here: factors of a parameter that is no "
        r"module's weight, such as the stacked experts of a mixture, .*; leave it out, and name linear layers in model.tar",
    ),
    "DoRA": (with_(adapter__use_dora="true"), r"adapter.use_dora is a setting of PEFT .*: with DoRA's magnitudes"),
    "layers of the adapter's own": (
        with_(model__layer_replication="[[0, 2]]"), r"model.layer_replication .*: layers that exist only in the adapter"
    ),
    "unknown table": (with_(trainin__x=1), r"no setting 'trainin'; did you mean 'training'"),
    "wrong type": (with_(training__batch_size='"many"'), r"training.batch_size is 'many'; it should be a valid integer"),
    "a bool is no number": (with_(adapter__rank="true"), r"adapter.rank is True; it should be a valid integer"),
    "not a number": (with_(training__learning_rate="nan"), r"training.learning_rate is nan; it should be a number"),
    "wrong choice": (with_(training__optimizer='"lion"'), r"training.optimizer is 'lion'; it should be 'adamw', 'adam' or"),
    "missing key": ({**TABLE, "task": {"name": "image-classification"}}, r"task.data is missing"),
    "missing table": ({"model": {"name": "x"}}, r"no \[task\] table"),
    "no table": ({**TABLE, "training": 3}, r"training is 3; it is a table"),
    "unknown task": (with_(task__name="image-clasification"), r"no task 'image-clasification'; did you mean"),
    "unknown adapter": (with_(adapter__name="lorra"), r"no adapter 'lorra'; did you mean 'lora'"),
    "adapter of another kind": (
        with_(method__name="ravan", adapter__name="lora"), r"'ravan' is not defined for adapter.name = 'lora'.*'multihead'",
    ),
    "unknown partitioner": (with_(clients__partition='{name = "dirichle"}'), r"no partitioner 'dirichle'; did you mean 'dirichlet'"),
    "wrong split key": (with_(clients__partition='{name = "iid", alpha = 1}'), r"no setting 'clients.partition.alpha'; clients.partition has none beside its name"),
    "missing split key": (with_(clients__partition='{name = "column"}'), r"clients.partition.column is missing"),
    "alpha": (with_(clients__partition='{name = "dirichlet", alpha = 0}'), r"alpha is 0.0; a Dirichlet split needs a positive"),
    "unequal ranks": (with_(clients__ranks="[2, 4]"), r"ranks \[2, 4\], but 'fedit' needs one rank.*'local' or 'ravan'"),
    "another rank": (with_(clients__ranks=4), r"clients.ranks is 4, but adapter.rank is 8"),
    "rank too high": (with_(method__name="local", clients__ranks=9), r"gives a client 9; it lies between 1 and .* 8"),
    "rank 0": (with_(adapter__rank=0), r"adapter.rank is 0"),
    "no clients": (with_(clients__count=0), r"clients.count is 0"),
    "too many a round": (with_(clients__per_round=4), r"clients.per_round is 4; it lies between 1 and clients.count, 3"),
    "no rounds": (with_(rounds=0), r"rounds is 0"),
    "both budgets": (with_(training__local_steps=1, training__local_epochs=1), r"both local_steps and local_epochs"),
    "rate": (with_(training__learning_rate=-1.0), r"learning_rate is -1.0; it must be a positive number"),
    "device": (with_(engine__device="tpu7"), r"engine.device is 'tpu7'"),
    "strength": (with_(method__name="fedrot-lora", method__strength=2.0), r"λ lies between 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("table,sentence", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_said_in_one_sentence(table, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build(table)
    assert "\n" not in str(caught.value)


LATER = {
    "client without data": (with_(clients__count=2000), r"clients.count is 2000, but there are only 1347 training rows"),
    "gram-schmidt": (
        with_(method__name="ravan", adapter='{name = "multihead", heads = 8, head_rank = 20}'), r"8 \* 20 = 160 is more than 96",
    ),
    "missing model": (with_(model__name='"./nowhere"'), r"no model folder './nowhere'"),
    "missing data": (with_(task__data='"./nothing.csv"'), r"no data at './nothing.csv'"),
    "missing column": (with_(task__label="lable"), r"no column 'lable' \(task.label\); did you mean 'label'"),
    "unmatched target": (with_(model__targets='["q_pro"]'), r"model.targets has 'q_pro', which matches no module.*q_proj"),
    "unmatched head": (with_(model__head='["clasifier"]'), r"model.head has 'clasifier'.*classifier"),
}  # fmt: skip


@pytest.mark.parametrize("table,sentence", LATER.values(), ids=LATER)
def test_what_only_the_data_or_the_model_can_tell(table, sentence):
    config = build(table)
    with pytest.raises(ValueError, match=sentence):
        federation = config.federation()
        federation.model.initial(0)


def test_a_missing_file_and_broken_toml(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file"):
        fedlora.read(tmp_path / "no.toml")
    (tmp_path / "broken.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match=r"not valid TOML"):
        fedlora.read(tmp_path / "broken.toml")


def parts(**others):
    """The arguments of a ``Config`` that is put together in Python."""
    task = ImageClassification(data="digits", train_rows=90, test_rows=60)
    own = {"model": ModelTable(str(TINY_VIT)), "task": task, "method": FedIT(LoRA(2)), "clients": Clients(count=3)}
    return {**own, "training": Training(local_steps=1, batch_size=8), "rounds": 1, **others}


def test_a_config_of_python_is_the_one_of_its_table(tmp_path):
    config = Config(**parts())
    assert build(config.table).table == config.table and config.table["method"]["name"] == "fedit"
    result = fedlora.run(config, tmp_path / "run")
    assert result.summary["method"] == "fedit"
    assert fedlora.read(tmp_path / "run" / "config.toml").table["task"] == config.table["task"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1


@pytest.mark.parametrize("name", [name for name in METHODS.names() if name != "local"])
def test_every_method_has_its_name_back(name):
    config = build(with_(method__name=f'"{name}"'))
    assert config.table["method"]["name"] == name == Config(**parts(method=config.method)).table["method"]["name"]


def test_a_changed_config_has_a_changed_table():
    config = build(TABLE)
    changed = replace(config, rounds=7, training=replace(config.training, learning_rate=0.5))
    assert (changed.table["rounds"], changed.table["training"]["learning_rate"]) == (7, 0.5)
    assert build(changed.table).table == changed.table


class Own(FedIT):
    title = "Own"


def test_a_method_of_ones_own_is_named_by_its_module():
    assert Config(**parts(method=Own(LoRA(2)))).table["method"]["name"] == f"{__name__}:Own"


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ({"rounds": 0}, "rounds is 0; a run needs at least 1"),
        ({"rounds": "5"}, "rounds is '5'; it should be a valid integer"),
        ({"seed": None}, "seed is None; it should be a valid integer"),
        ({"model": "demo-vit"}, "model is 'demo-vit'; it should be an object of its settings"),
        ({"method": FedIT}, "method is <class .*FedIT.*; it should be an object"),
        ({"method": FedIT(MultiHead(2, 4))}, "'fedit' is not defined for adapter.name = 'multihead'; set it to 'lora'"),
        ({"method": FedIT(Dense())}, "'fedit' is not defined for adapter.name = 'fedlora.adapters._dense:Dense'; set it to 'lora' or 'vera'"),
        ({"method": type("Local", (FedIT,), {})(LoRA(2))}, "cannot be imported by name"),
        ({"training": Training(local_steps=2.5)}, "training.local_steps is 2.5; it should be a valid integer"),
        ({"task": ImageClassification(data=Path("digits"))}, "task.data is PosixPath.'digits'.; it should be a valid str"),
        ({"clients": Clients(count=3, ranks=[1, 2, 2])}, "clients.ranks gives the clients ranks"),
        ({"engine": Engine(offload=True)}, "engine.offload keeps uploads on disk"),
    ],
)  # fmt: skip
def test_mistakes_of_python_are_said_before_anything_is_trained(others, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**parts(**others))
