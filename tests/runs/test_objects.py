"""Runs on Python objects: a model, datasets, a loss and metrics of the user's own."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import fedlora as fl
from fedlora.runs.config import read
from fedlora.runs.objects import Objects, config_of_objects, describe_object
from fedlora.schema import ConfigError
from fedlora.training.frozen import Frozen
from tests.fixtures.federation import TABLE, TINY_VIT, config, same, settings
from tests.fixtures.own_models import (
    ConvNet,
    Mixer,
    Points,
    Records,
    TabularTransformer,
    absolute,
    accuracy,
    cross_entropies,
    cross_entropy,
    squared,
)

IMAGE, PATCHES = (1, 6, 6), (8, 4)
FAST = fl.Training(local_steps=3, batch_size=8, learning_rate=1e-2)
NET = Mixer()
METHODS = {"fedsa-lora": None, "flora-na": None, "fedrot-lora": None, "ravan": fl.MultiHead(heads=2, head_rank=2)}


def points(clients=3, shape=PATCHES):
    return [Points(12 + 3 * k, shape, k) for k in range(clients)]


def mixer(**changes):
    """The arguments of a run on an MLP-mixer and three datasets."""
    own = {
        "model": NET, "train": points(), "test": Points(20, PATCHES, 9), "loss": cross_entropy,
        "metrics": {"accuracy": accuracy}, "targets": ["tokens.*", "channels.*"], "head": ["out"], "training": FAST,
        "rounds": 2,
    }  # fmt: skip
    return {**own, **changes}


# -------------------------------------------------------------------------- three models, four methods
@pytest.mark.parametrize("method", METHODS)
def test_a_mixer(method, tmp_path):
    result = fl.run(**mixer(method=method, adapter=METHODS[method], out=tmp_path / "run"))
    check(result, tmp_path, personal=method == "fedsa-lora")


@pytest.mark.parametrize("method", METHODS)
def test_a_convolutional_net(method, tmp_path):
    net = ConvNet()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    result = fl.run(
        model=net, train=points(shape=IMAGE), test=[Points(9, IMAGE, 10 + k) for k in range(3)], loss=cross_entropy,
        metrics={"accuracy": accuracy}, targets=["fc1", "fc2"], head=["out"], method=method, adapter=METHODS[method],
        training=FAST, rounds=2, out=tmp_path / "run",
    )  # fmt: skip
    check(result, tmp_path, personal=method == "fedsa-lora")
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items()), "the caller's own net"
    assert (
        all(x.requires_grad for x in net.parameters())
        and json.loads((tmp_path / "run" / "rows.json").read_text())["clients"]["2"]["test"] == 9
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_tabular_transformer(method, tmp_path):
    result = fl.run(
        model=TabularTransformer, train=Records(60, 0), test=Records(30, 1), clients=3, loss=squared,
        metrics={"absolute": absolute}, higher=False, targets=["linear1", "linear2"], head=["out", "names"],
        method=method, adapter=METHODS[method], training=FAST, rounds=2, out=tmp_path / "run",
    )  # fmt: skip
    check(result, tmp_path, personal=method == "fedsa-lora")
    assert result.summary["metric"] == {"name": "absolute", "higher": False}
    clients = result.records[-1]["clients"]
    assert clients["worst"] == max(clients["each"])


def check(result, tmp_path, personal):
    """The result is written, reported and exported."""
    name = result.summary["metric"]["name"]
    assert all(math.isfinite(record["clients"]["mean"]) for record in result.records)
    assert ("global" in result.records[-1]) == (not personal)
    assert result.report(tmp_path / "page.html").stat().st_size > 10_000
    export = result.export(tmp_path / "export", client=1 if personal else None)
    assert export["difference"] < 1e-5
    card = (tmp_path / "export" / "README.md").read_text()
    assert "fedlora.load_update" in card and name in card and "base_model" not in card
    opened = fl.open(tmp_path / "run")
    assert opened.summary["metric"]["name"] == name and opened.config.task.objects["loss"].startswith("tests.fixtures")


# ------------------------------------------------------------------------------------ the same as files
class Digits(torch.utils.data.Dataset):
    """Rows of the embedded digits as a user would have them."""

    def __init__(self, task, examples):
        self.batch = task.collate(examples, torch.arange(len(examples)))

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, row):
        return {name: x[row] for name, x in self.batch.items()}


@pytest.fixture(scope="module")
def digits():
    made = config()
    data = made.task.load(made.model.name, made.seed)
    own = {
        "train": Digits(made.task, data.train), "test": Digits(made.task, data.test),
        "model": lambda: made.task.network(str(TINY_VIT), 10, made.seed),
        "loss": lambda model, b: functional.cross_entropy(model(b["pixel_values"]).logits.float(), b["labels"]),
        "metrics": {"accuracy": lambda model, b: ((model(b["pixel_values"]).logits.argmax(-1) == b["labels"]).sum(), len(b["labels"]))},
    }  # fmt: skip
    return own, {"head": ["classifier"], "clients": TABLE["clients"], "rounds": 2, "training": TABLE["training"]}


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora", "fedex-lora", "ravan"])
def test_objects_equal_files_to_the_bit(digits, method, tmp_path):
    made = config(*settings(method))
    files = fl.run(made, tmp_path / "files")
    own, shape = digits
    objects = fl.run(**own, **shape, method=method, adapter=made.method.adapter, out=tmp_path / "objects")
    assert same(files.shared, objects.shared) and files.kept.keys() == objects.kept.keys()
    assert all(same(files.kept[k], objects.kept[k]) for k in files.kept)
    for a, b in zip(files.records, objects.records, strict=True):
        assert a["bytes"] == b["bytes"] and a["loss"] == b["loss"] and a["clients"]["each"] == b["clients"]["each"]
        assert a.get("global", {}).get("accuracy") == b.get("global", {}).get("accuracy")
    rows = [json.loads((tmp_path / name / "rows.json").read_text()) for name in ("files", "objects")]
    assert rows[0] == rows[1]


def test_own_labels_of_each_client(digits):
    """Concept shift: each client has its own order of the labels, as with files."""
    own, shape = digits
    clients = {**TABLE["clients"], "permute_labels": True}
    files, objects = fl.run(config("clients.permute_labels=true")), fl.run(**own, **{**shape, "clients": clients})
    own_adapter = fl.run(**own, **{**shape, "clients": clients}, adapter=fl.LoRA(rank=2, alpha=4))
    assert same(files.shared, own_adapter.shared) and not same(files.shared, objects.shared), "the rank"
    assert files.records[-1]["clients"]["each"] == own_adapter.records[-1]["clients"]["each"]


# -------------------------------------------------------------------------------------------- going on
def test_resume_goes_on_to_the_bit(tmp_path):
    net = Mixer()
    whole = fl.run(**mixer(model=net, method="fedsa-lora", rounds=4, out=tmp_path / "whole"))
    fl.run(**mixer(model=net, method="fedsa-lora", out=tmp_path / "run"))
    objects = {
        key: value for key, value in mixer(model=net).items() if key in ("model", "train", "test", "loss", "metrics")
    }
    again = fl.resume(tmp_path / "run", rounds=4, **objects)
    assert same(whole.shared, again.shared) and all(same(whole.kept[k], again.kept[k]) for k in whole.kept)
    assert [r["clients"] for r in whole.records] == [r["clients"] for r in again.records]
    assert again.export(tmp_path / "export", client=0)["difference"] < 1e-5


def test_resume_with_other_objects(tmp_path):
    fl.run(**mixer(out=tmp_path / "run"))
    objects = {key: value for key, value in mixer().items() if key in ("model", "train", "test", "loss", "metrics")}

    def resume(**changes):
        return fl.resume(tmp_path / "run", rounds=3, **{**objects, **changes})

    with pytest.raises(
        ConfigError, match=r"were Python objects \(model = tests.fixtures.own_models:Mixer, train = 3 x "
    ):
        fl.resume(tmp_path / "run", rounds=3)
    with pytest.raises(ConfigError, match="test is missing; a run on Python objects needs model, train and test"):
        fl.resume(tmp_path / "run", rounds=3, model=NET, train=points())
    with pytest.raises(ValueError, match="training rows have another content"):
        resume(train=[Points(12, PATCHES, 8), *points()[1:]])
    with pytest.raises(ValueError, match="there are 21 test rows, and were 20"):
        resume(test=Points(21, PATCHES, 9))
    with pytest.raises(ValueError, match="the pretrained model has other weights"):
        resume(model=Mixer())
    with pytest.raises(ConfigError, match="the first metric is 'other', and that of the run is 'accuracy'"):
        resume(metrics={"other": accuracy})
    with pytest.raises(ValueError, match="clients.count is 3, and clients.partition is 'given' with 2 datasets"):
        resume(train=points(2))
    assert resume().summary["rounds"] == 3


def test_the_best_round_follows_the_metrics_direction(tmp_path):
    values = iter([3.0, 1.0, 2.0] * 4)
    sinks = {"sink": lambda model, batch: (next(values) * len(batch[1]), len(batch[1]))}

    def best(name, **changes):
        out = tmp_path / name
        own = mixer(metrics=sinks, rounds=3, train=Points(12, PATCHES, 0), clients=1, evaluation={"batch_size": 256})
        fl.run(**own, checkpoint={"best": "global"}, out=out, **changes)
        return json.loads((out / "summary.json").read_text())["best"]

    low = best("low", higher=False)
    assert low["value"] == min(r["global"]["sink"] for r in fl.open(tmp_path / "low").records)
    high = best("high")
    assert high["value"] == max(r["global"]["sink"] for r in fl.open(tmp_path / "high").records)


def test_the_command_line_reads_the_folder(tmp_path, commands):
    out = tmp_path / "run"
    fl.run(**mixer(out=out))
    assert commands.call(["fedlora", "show", "run"], tmp_path).returncode == 0
    assert commands.call(["fedlora", "report", "run", "--out", "page.html"], tmp_path).returncode == 0
    done = commands.call(["fedlora", "export", "run", "--out", "export", "--json"], tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["difference"] is None
    for command in (["resume", "run", "--rounds", "3"], ["personal", "run"], ["plan", "run/config.toml"]):
        refused = commands.call(["fedlora", *command], tmp_path)
        assert refused.returncode == 2 and "Python object" in refused.stderr, refused


# ------------------------------------------------------------------------------------------- comparing
def test_methods_are_compared(tmp_path):
    own = mixer(
        out=tmp_path / "both", methods=["fedit", "fedrot-lora", "centralised"], seeds=[0, 1], adapter=fl.LoRA(rank=1)
    )
    frame = fl.compare(**own).frame()
    assert sorted(set(frame["method"])) == ["centralised", "fedit", "fedrot-lora"] and len(frame) == 6
    alone = fl.run(**mixer(method="fedit", adapter=fl.LoRA(rank=1), seed=1))
    kept = fl.open(tmp_path / "both" / "fedit-seed1")
    assert same(kept.shared, alone.shared)
    assert fl.open(tmp_path / "both").report(tmp_path / "page.html").exists()
    with pytest.raises(ConfigError, match="Python objects of this process, but jobs is 2; set it to 1"):
        fl.compare(**mixer(methods=["fedit"]), jobs=2)
    with pytest.raises(ConfigError, match="a sweep chooses by validation rows"):
        fl.sweep(
            config_of_objects(Objects(NET, points(), points()[0], cross_entropy)),
            {"training.learning_rate": [1e-3, 1e-2]},
        )


# --------------------------------------------------------------------------------------------- privacy
def test_single_rows_are_private_with_their_losses():
    private = {"privacy": {"level": "example", "noise_multiplier": 1.0}, "metrics": {}}
    with pytest.raises(ConfigError, match="privacy.level is 'example', but each row's loss is needed"):
        fl.run(**mixer(**private))
    result = fl.run(**mixer(losses=cross_entropies, **private))
    assert result.summary["privacy"]["epsilon"] > 0 and result.summary["metric"] == {"name": "loss", "higher": False}

    def mixed(model, batch):
        x, y = batch
        return functional.cross_entropy(model(x - x.mean(0)), y, reduction="none")

    with pytest.raises(ValueError, match="losses returns other values for rows in a batch than for each row alone"):
        fl.run(**mixer(losses=mixed, **private))


def test_whole_clients_are_private():
    private = {
        "privacy": {"level": "client", "noise_multiplier": 1.0},
        "method": {"name": "fedit", "weighting": "uniform"},
    }
    assert fl.run(**mixer(**private)).summary["privacy"]["epsilon"] > 0


# ------------------------------------------------------------------------------------------- refusals
class Flat(nn.Module):
    """No linear layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 3, 3)

    def forward(self, x):
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["tokns"]}, "model.targets has 'tokns', which matches no module of this network; near names are tokens"),
        ({"head": ["outt"]}, "model.head has 'outt', which matches no module"),
        ({"targets": None}, "set model.targets to some of its linear layers: channels.0, channels.1"),
        ({"model": Flat(), "targets": None, "head": []}, "it has no linear layer at all"),
        ({"loss": cross_entropies}, r"loss returned a tensor of shape \(8,\); it should return the mean loss"),
        ({"loss": None}, "without a loss, model\\(\\*\\*batch\\).loss is computed, and a batch is a list"),
        ({"loss": 3}, "loss is 3; it should be a function"),
        ({"metrics": [accuracy]}, "metrics is .*; it should be a dict of functions by name"),
        ({"metrics": {"tp": accuracy}}, "task.metric is 'tp'; a metric's name has letters"),
        ({"metrics": {"own": lambda m, b: 1.0}}, "the metric 'own' returned a float; it should return a sum"),
        ({"metrics": {"own": lambda m, b: (0, 0)}}, "the metric 'own' counted nothing"),
        ({"metrics": {"own": lambda m, b: (math.nan, 1)}}, "the sum of the metric 'own' is nan on test rows"),
        ({"train": iter([1])}, "train is a list_iterator, which has no length"),
        ({"train": [*points(2), []]}, r"train\[2\] has no rows; leave it out"),
        ({"train": None}, "train is missing; a run on Python objects needs model, train and test"),
        ({"model": 3}, "model is a int; it should be an nn.Module"),
        ({"model": "no-such-folder/x/y"}, "there is no model folder"),
        ({"partition": "iid"}, "train is a list of 3 datasets, one a client, and partition is"),
        ({"clients": 4}, "train is a list of 3 datasets, one a client, and clients is 4"),
        ({"metod": "ravan"}, "there is no argument 'metod'; did you mean 'method'"),
        ({"config": "mine.toml"}, "a configuration and model are both given"),
        ({"head": "out"}, "head is 'out'; it is a list of names"),
        ({"parties": ["a.toml"]}, "parties and model are both given"),
        ({"engine": {"name": "flower-simulation"}}, "whose clients are other processes"),
        ({"train": Records(30, 0), "partition": "dirichlet", "clients": 3}, "partitions by label, but all rows have the same"),
        ({"clients": {"permute_labels": True}}, "a batch has no key 'labels' with a tensor"),
    ],
)  # fmt: skip
def test_wrong_objects(changes, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        fl.run(**mixer(**changes))


def test_nothing_to_run():
    with pytest.raises(ConfigError, match="the configuration is None, and there are no objects"):
        fl.run()
    with pytest.raises(ConfigError, match="this run has no folder"):
        fl.run(**mixer()).export("nowhere")


def test_a_net_that_keeps_statistics_of_its_own():
    class Counting(Mixer):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += len(x)
            return super().forward(x)

    with pytest.raises(ValueError, match="changes its buffer 'seen' when it is trained, and buffers are not sent"):
        fl.run(**mixer(model=Counting()))
    net = ConvNet()
    frozen = Frozen.read(net, {})
    net(torch.randn(4, *IMAGE))
    with pytest.raises(ValueError, match="body.1"):
        frozen.check(net)


def test_attention_whose_weights_are_only_read():
    layer = {"model": TabularTransformer, "train": Records(30, 0), "test": Records(9, 1), "clients": 3, "loss": squared}
    with pytest.raises(ValueError, match="whose weight nn.MultiheadAttention reads without calling it"):
        fl.run(**layer, targets=["out_proj"])


# ------------------------------------------------------------------------------------------ the setting
def test_config_toml_names_the_objects(tmp_path):
    fl.run(**mixer(out=tmp_path / "run", metrics={"accuracy": accuracy, "own": accuracy}, seed=3))
    table = read(tmp_path / "run" / "config.toml").table
    assert table["task"] == {
        "name": "objects", "metric": "accuracy",
        "objects": {
            "model": "tests.fixtures.own_models:Mixer", "train": "3 x tests.fixtures.own_models:Points",
            "test": "tests.fixtures.own_models:Points", "loss": "tests.fixtures.own_models:cross_entropy",
            "accuracy": "tests.fixtures.own_models:accuracy", "own": "tests.fixtures.own_models:accuracy",
        },
    }  # fmt: skip
    assert table["clients"]["count"] == 3 and table["clients"]["partition"] == {"name": "given"} and table["seed"] == 3
    assert table["training"]["precision"] == "float32" and table["model"]["head"] == ["out"]
    assert describe_object("roberta-base") == "roberta-base"


def test_settings_as_objects_and_as_tables():
    objects = Objects(NET, points(), points()[0], cross_entropy)
    a = config_of_objects(objects, ["tokens.*"], method=fl.methods.load("ravan")(fl.MultiHead(heads=2, head_rank=2)), training=FAST,
                          clients=fl.Clients(per_round=2), compression=fl.Compression(up="int8"))  # fmt: skip
    b = config_of_objects(objects, ["tokens.*"], method="ravan", adapter={"name": "multihead", "heads": 2, "head_rank": 2}, clients={"per_round": 2},
                          training={"local_steps": 3, "batch_size": 8, "learning_rate": 1e-2}, compression={"up": "int8"})  # fmt: skip
    assert a.table == b.table and a.clients.count == 3 and a.task.code.model is NET
    overlaid = fl.run(a, overrides={"rounds": 1})
    assert len(overlaid.records) == 1


def test_a_model_folder_by_its_own_class(tmp_path):
    from transformers import AutoModelForImageClassification

    AutoModelForImageClassification.from_pretrained(
        TINY_VIT, num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path / "vit")
    rows = [{"pixel_values": torch.randn(1, 8, 8), "labels": k % 3} for k in range(18)]
    result = fl.run(model=tmp_path / "vit", train=rows, test=rows, clients=3, rounds=1, training=FAST)
    assert result.summary["metric"]["name"] == "loss" and "vit" in result.code.model.args[0]
    assert not any("classifier" in part for part in result.shared), "nothing is trained in full unless head names it"


def test_training_lowers_the_loss_on_the_training_rows():
    """The models and losses of these tests are no stubs."""
    torch.manual_seed(0)
    rows = Points(240, PATCHES, 0)
    own = mixer(model=Mixer(), train=rows, test=rows, clients=3, metrics={}, method="fedit", rounds=5)
    records = fl.run(**{**own, "training": fl.Training(local_steps=10, learning_rate=1e-2)}).records
    losses = [record["global"]["loss"] for record in records]
    assert losses[-1] < losses[0]
