"""A Config of objects equals the one of TOML with the same settings: its table, its run and its run folder."""

import csv
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest

import fedlora as fl
from fedlora.engines.partition import PARTITIONERS, Dirichlet
from fedlora.methods import METHODS
from fedlora.runs.config import build, default_adapter, to_config, to_table
from fedlora.runs.trackers import Track
from fedlora.runs.trackers.tensorboard import TensorBoard
from fedlora.schema import ConfigError
from fedlora.security.attacks.sign_flip import SignFlip
from fedlora.security.robust.krum import Krum
from fedlora.tasks.objects import ObjectTask
from tests.docs.standins import encoder
from tests.fixtures.federation import TINY_VIT, same

MODEL, IMAGES = fl.ModelTable(str(TINY_VIT)), fl.tasks.load("image-classification")
DIGITS = IMAGES(data="digits", train_rows=90, test_rows=60)
PLAIN = {
    "model": {"name": str(TINY_VIT)},
    "task": {"name": "image-classification", "data": "digits", "train_rows": 90, "test_rows": 60},
}
CASES = {  # the objects, and the TOML with the same settings
    "nothing": ({}, ""),
    "method without an adapter": ({"method": fl.methods.load("ravan")()}, '[method]\nname = "ravan"'),
    "method and adapter": (
        {"method": fl.methods.load("fedsa-lora")(fl.VeRA(rank=3))},
        '[method]\nname = "fedsa-lora"\n[adapter]\nname = "vera"\nrank = 3',
    ),
    "whole numbers for floats": (
        {
            "training": fl.Training(learning_rate=1, weight_decay=0),
            "method": fl.methods.load("fedit")(fl.LoRA(rank=2, alpha=4)),
        },
        "[training]\nlearning_rate = 1.0\nweight_decay = 0.0\n[adapter]\nrank = 2\nalpha = 4.0",
    ),
    "partition by name": ({"clients": fl.Clients(count=4, partition="dirichlet")}, '[clients]\ncount = 4\npartition = "dirichlet"'),
    "partition by table": (
        {"clients": fl.Clients(count=4, partition={"name": "dirichlet", "alpha": 1})},
        '[clients]\ncount = 4\npartition = {name = "dirichlet", alpha = 1.0}',
    ),
    "partition by object": (
        {"clients": fl.Clients(count=4, partition=Dirichlet(alpha=1))},
        '[clients]\ncount = 4\npartition = {name = "dirichlet", alpha = 1.0}',
    ),
    "epochs": ({"training": fl.Training(local_epochs=2)}, "[training]\nlocal_epochs = 2"),
    "privacy": (
        {"privacy": fl.Privacy(level="example", noise_multiplier=1)},
        '[privacy]\nlevel = "example"\nnoise_multiplier = 1.0',
    ),
    "trust": (
        {"robust": Krum(), "attack": SignFlip(clients=[1]), "clients": fl.Clients(count=6)},
        '[robust]\nname = "krum"\n[attack]\nname = "sign-flip"\nclients = [1]\n[clients]\ncount = 6',
    ),
    "the others": (
        {
            "evaluation": fl.Evaluation(every=2), "validation": fl.Validation(strikes=2), "rounds": 3, "seed": 4,
            "compression": fl.Compression(up="int8"), "engine": fl.Engine(threads=1), "flower": fl.Network(min_clients=3),
            "server": fl.ServerOptimizer(optimizer="adam", learning_rate=1), "checkpoint": fl.CheckpointSettings(keep=1),
            "track": Track({"tensorboard": TensorBoard()}),
        },
        'rounds = 3\nseed = 4\n[evaluation]\nevery = 2\n[validation]\nstrikes = 2\n[compression]\nup = "int8"\n[engine]\n'
        'threads = 1\n[flower]\nmin_clients = 3\n[server]\noptimizer = "adam"\nlearning_rate = 1.0\n[checkpoint]\nkeep = 1\n'
        "[track]\ntensorboard = true",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("objects", "toml"), CASES.values(), ids=CASES)
def test_objects_have_the_table_of_their_toml(objects, toml):
    made, read = fl.Config(model=MODEL, task=DIGITS, **objects), build({**PLAIN, **tomllib.loads(toml)})
    assert made.table == read.table
    assert repr(made.table) == repr(read.table), "1 is not 1.0"
    assert repr(replace(made, clients=read.clients)) == repr(read)
    assert build(made.table).table == build(to_table(made)).table == made.table
    assert replace(made, rounds=7).table == {**read.table, "rounds": 7}


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_of_objects_has_the_table_of_its_toml(name):
    kind = METHODS.load(name)
    made = fl.Config(model=MODEL, task=DIGITS, method=kind())
    assert made.table == build({**PLAIN, "method": {"name": name}}).table
    assert made.method.adapter == default_adapter(kind)


RUNS = {
    "fedit": {},
    "flora": {},
    "fedex-lora": {"clients": fl.Clients(count=3, per_round=2, partition="dirichlet")},
    "ravan": {"adapter": fl.MultiHead(heads=2, head_rank=4)},
    "fed-sb": {"adapter": fl.LoRASB(core_rank=5)},
    "feddpa": {"adapter": fl.DualLoRA(rank=2)},
}


@pytest.mark.parametrize("name", RUNS)
def test_objects_run_to_the_bits_of_their_toml(name, tmp_path):
    adapter = RUNS[name].get("adapter", fl.LoRA(rank=2, alpha=4))
    clients = RUNS[name].get("clients", fl.Clients(count=3))
    training = fl.Training(local_steps=2, batch_size=8, learning_rate=5e-3)
    method = fl.methods.load(name)(adapter)
    made = fl.run(
        fl.Config(model=MODEL, task=DIGITS, method=method, clients=clients, training=training, rounds=2), tmp_path / "a"
    )
    read = fl.run(tmp_path / "a" / "config.toml", tmp_path / "b")
    table = tomllib.loads((tmp_path / "a" / "config.toml").read_text())
    asked = {
        **PLAIN, "method": {"name": name}, "adapter": table["adapter"], "rounds": 2,
        "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 5e-3},
        "clients": {"count": 3, **({"per_round": 2, "partition": {"name": "dirichlet"}} if clients.per_round else {})},
    }  # fmt: skip
    from_dict = fl.run(asked, tmp_path / "c")
    for other in (read, from_dict):
        assert same(made.shared, other.shared) and all(same(made.kept[k], other.kept[k]) for k in made.kept)
        assert made.summary["final"] == other.summary["final"]
    assert len({(tmp_path / x / "config.toml").read_text() for x in "abc"}) == 1


@pytest.mark.parametrize("kind", ["text-classification", "text-regression"])
def test_text_of_objects_runs_to_the_bits_of_its_toml(kind, tmp_path):
    encoder(tmp_path, "bert")
    for split, count in (("train", 30), ("test", 12)):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows(
                [["a b" if i % 2 else "c d", i % 2 if kind == "text-classification" else i / 7] for i in range(count)]
            )
    task = fl.tasks.load(kind)(data=str(tmp_path), text="text", label="label", max_length=8)
    settings = {
        "clients": fl.Clients(count=2, partition="dirichlet"),
        "training": fl.Training(local_steps=1),
        "rounds": 1,
    }
    made = fl.run(fl.Config(model=fl.ModelTable(str(tmp_path / "bert")), task=task, **settings))
    read = fl.run({
        "model": {"name": str(tmp_path / "bert")}, "rounds": 1, "training": {"local_steps": 1},
        "task": {"name": kind, "data": str(tmp_path), "text": "text", "label": "label", "max_length": 8},
        "clients": {"count": 2, "partition": "dirichlet"},
    })  # fmt: skip
    assert same(made.shared, read.shared) and made.summary["final"] == read.summary["final"]


OTHERS = {
    "a budget of another kind": {"training.local_epochs": 1},
    "another method and its own adapter": {"method.name": "ravan"},
    "another partition": {"clients.partition": {"name": "dirichlet", "alpha": 0.1}},
    "privacy": {"privacy.level": "example", "privacy.noise_multiplier": 1.0},
}


@pytest.mark.parametrize("overrides", OTHERS.values(), ids=OTHERS)
def test_settings_laid_over_objects_are_those_laid_over_the_toml(overrides, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        f'[model]\nname = "{TINY_VIT}"\n[task]\nname = "image-classification"\ndata = "digits"\ntrain_rows = 90\ntest_rows = 60'
    )
    found = [
        to_config(x, overrides) for x in (file, str(file), PLAIN, fl.read(file), fl.Config(model=MODEL, task=DIGITS))
    ]
    assert all(config.table == found[0].table for config in found)
    assert found[0].table != build(PLAIN).table


def test_a_task_keeps_its_python_objects_under_other_settings():
    code = SimpleNamespace(losses_obstacle=None)
    config = fl.Config(model=MODEL, task=ObjectTask(_code=code))
    changed = to_config(config, {"rounds": 3, "task.metric": "loss"})
    assert changed.rounds == 3 and changed.task._code is code
    assert to_config(config, {"task": {"name": "image-classification", "data": "digits"}}).task == IMAGES(data="digits")


def test_settings_of_a_comparison_stay_with_a_config(tmp_path):
    labels = {"half": {"method": {"name": "fedrot-lora", "strength": 0.5}}}
    config = build({**PLAIN, "compare": labels})
    assert config.compare == labels == to_table(config)["compare"] and "compare" not in config.table
    assert fl.Config(model=MODEL, task=DIGITS, compare=labels) == config


WRONG = {
    "partition": (lambda: fl.Clients(partition=3), r"clients.partition is 3; it should be a name"),
    "partition without a name": (lambda: fl.Clients(partition={"alpha": 1.0}), r"\[clients.partition\] has no name"),
    "unknown partition": (lambda: fl.Clients(partition="dirichelt"), r"did you mean 'dirichlet'"),
    "section of another kind": (lambda: {"training": fl.Evaluation()}, r"training is Evaluation\(.*a Training, as"),
    "task of another kind": (lambda: {"task": fl.LoRA()}, r"task is LoRA\(.*a Task"),
    "nothing": (lambda: {"evaluation": None}, r"evaluation is None; it should be an object of its settings"),
    "trackers": (lambda: {"track": {"tensorboard": True}}, r"track is \{'tensorboard': True\}; it should be a Track"),
    "tracker": (lambda: {"track": Track({"tensorboard": True})}, r"track is Track\(.*trackers by name"),
    "name of a tracker": (lambda: {"track": Track({"tensorbord": TensorBoard()})}, r"did you mean 'tensorboard'"),
    "comparison": (lambda: {"compare": {"fedit": 3}}, r"compare.fedit is 3; it is a table of settings"),
    "comparisons": (lambda: {"compare": 3}, r"compare is 3; it is a table of settings"),
}


@pytest.mark.parametrize(("objects", "sentence"), WRONG.values(), ids=WRONG)
def test_mistakes_in_objects_are_one_sentence(objects, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        fl.Config(**{"model": MODEL, "task": DIGITS, **objects()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "overrides", "sentence"),
    [
        (3, (), "the configuration is 3; it should be the path of a .toml file, a dict or a fedlora.Config"),
        (PLAIN, "rounds=3", r"overrides is 'rounds=3'; it is a list, e.g. \['rounds=3'\], or a dict by dotted keys"),
        (PLAIN, 3, r"overrides is 3; it is a list, e.g. \['rounds=5'\]"),
        (PLAIN, {3: 1}, r"overrides is \{3: 1\}; it is a list"),
        (PLAIN, ["rounds"], "the override 'rounds' has no '='"),
        (PLAIN, {"rouns": 3}, "there is no setting 'rouns'; did you mean 'rounds'"),
    ],
)
def test_mistakes_in_arguments_are_one_sentence(config, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        fl.run(config, overrides=overrides)


def test_every_partitioner_is_accepted_as_a_name_or_an_object():
    for name in ("iid", "dirichlet", "inner-dirichlet", "pathological", "own"):
        kind = PARTITIONERS.load(name)
        named, made = fl.Clients(partition=name), fl.Clients(partition=kind())
        assert named.partitioner == made.partitioner == kind()
