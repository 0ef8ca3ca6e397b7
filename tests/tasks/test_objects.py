"""Python objects as a task: rows, labels, batches, loss and scores of the caller's own."""

import math
from collections import namedtuple

import datasets
import pytest
import torch
from torch import nn

from fedlora.runs.config import build
from fedlora.schema import ConfigError
from fedlora.tasks._base import move_batch
from fedlora.tasks._code import OwnObjects, check_sum, collate_rows
from fedlora.tasks.data.datasets import check_dataset, digest_value, read_rows
from fedlora.tasks.metrics.scores import Scores, compute_metrics, is_higher_better, pool
from fedlora.tasks.objects import ObjectTask
from fedlora.training.evaluation import summarize
from tests.fixtures.federation import TINY_VIT
from tests.fixtures.own_models import Mixer, Points, Records, accuracy, cross_entropies, cross_entropy

CPU = torch.device("cpu")
SHAPE = (8, 4)
NET = Mixer()


def code(**changes):
    settings = {
        "model": NET, "train": [Points(12, SHAPE, 0), Points(9, SHAPE, 1)], "test": Points(15, SHAPE, 2),
        "loss_function": cross_entropy, "metrics": {"accuracy": accuracy},
    }  # fmt: skip
    return OwnObjects(**{**settings, **changes})


# ------------------------------------------------------------------------------------------------ rows
def test_rows_are_numbered_over_all_datasets():
    own = code()
    data = own.load(0, "client")
    assert data.train.features["row"].tolist() == list(range(21)) and data.test.features["row"].tolist() == [
        *range(21, 36)
    ]
    assert data.train.groups == ("0",) * 12 + ("1",) * 9 and data.test.groups is None
    x, y = own.collate(data.train, torch.tensor([13, 3]))
    assert (
        torch.equal(x, torch.stack([own.train[1].x[1], own.train[0].x[3]]))
        and y.tolist() == data.train.labels[[13, 3]].tolist()
    )
    x, _ = own.collate(data.test, torch.tensor([14]))
    assert torch.equal(x[0], own.test.x[14])
    assert data.label_names == ("0", "1", "2") and data.notes == ()


def test_labels_from_columns_targets_and_tuples():
    hub = datasets.Dataset.from_dict({"label": [2, 0, 1], "x": [[1.0], [2.0], [3.0]]})
    named = hub.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    tensors = torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1]))
    subset = torch.utils.data.Subset(tensors, [1, 2])
    for rows in (hub, named, tensors, [(0.0, 2), (0.0, torch.tensor(0)), (0.0, 1)], [{"labels": y} for y in (2, 0, 1)]):
        assert read_rows(rows).labels.tolist() == [2, 0, 1]
    assert read_rows(named).names == ("a", "b", "c") and read_rows(subset).labels.tolist() == [0, 1]
    for rows in (Records(3, 0), [1.0, 2.0], [(0, 1.5)], hub.remove_columns("label"), [{"labels": [1, 2]}]):
        assert read_rows(rows).labels is None


def test_numbers_that_are_no_classes_only_tell_rows_apart():
    own = code(train=[[(0.0, y) for y in (-5, 7, 7)]], test=[(0.0, 7)])
    data = own.load(0, None)
    assert (
        data.label_names == () and data.train.labels.tolist() == [0, 0, 0] and data.train.strata.tolist() == [0, 1, 1]
    )
    many = code(train=[[(0.0, y) for y in range(2000)]], test=[(0.0, 1)]).load(0, None)
    assert many.label_names == () and int(many.train.strata.max()) == 0, "ages in days are no classes"


def test_digests_tell_rows_apart():
    values = [
        torch.arange(3), torch.arange(3.0), torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2), [1, 2], (1,),
        {"a": 1}, {"a": 2}, {"b": 1}, "1", 1, 1.0, True, None, b"1", torch.arange(3).numpy(), [[1], 2], [1, [2]],
    ]  # fmt: skip
    digests = [digest_value(value)[0] for value in values]
    assert len(set(digests)) == len(values)
    assert digest_value({"b": 1, "a": [2]})[0] == digest_value({"a": [2], "b": 1})[0]
    assert digest_value([1, Scores({})])[1] == {"Scores"}


def test_rows_that_cannot_be_compared_are_noted():
    class Random(Points):
        def __getitem__(self, row):
            return self.x[row] + torch.rand(()), 0

    before = torch.get_rng_state()
    data = code(train=[Random(5, SHAPE, 0)]).load(0, None)
    assert torch.equal(before, torch.get_rng_state()), "the caller's draws"
    assert "digest" not in data.train.features and "digest" in data.test.features
    assert data.notes == (
        "some rows have other values each time they are read; resuming cannot tell whether these have changed.",
    )
    (note,) = code(train=[[Scores({}), Scores({})]]).load(0, None).notes
    assert note == "some rows have a Scores, which cannot be digested; resuming cannot tell whether these have changed."


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (iter([1]), "train is a list_iterator, which has no length; clients draw their rows by number"),
        ({"train": [1]}, "train is a dict, which is no dataset"),
        ({1, 2}, "train is a set, whose items have no index"),
    ],
)
def test_what_is_no_dataset(value, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(value, "train")


def test_wrong_lists_of_datasets():
    with pytest.raises(ValueError, match=r"train\[1\] has no rows; leave it out"):
        code(train=[Points(3, SHAPE, 0), Points(0, SHAPE, 0)])
    with pytest.raises(ValueError, match="train has no rows"):
        code(train=[])
    with pytest.raises(ValueError, match="test is a list of 3 datasets, and train is one of 2"):
        code(test=[Points(3, SHAPE, k) for k in range(3)])
    with pytest.raises(ValueError, match="test is a list of 1 datasets, and train is one dataset for all clients"):
        code(train=Points(3, SHAPE, 0), test=[Points(3, SHAPE, 0)])
    with pytest.raises(ValueError, match=r"train\[1\] is a list_iterator, which has no length"):
        code(train=[[(1, 2)], iter([(1, 2)])])
    assert code(train=[(1, 2)]).clients is None, "a list of rows is one dataset"


def test_a_column_for_a_natural_partition():
    rows = datasets.Dataset.from_dict({"site": ["a", "b", "a"], "x": [1, 2, 3]})
    assert code(train=rows, test=rows).load(0, "site").train.groups == ("a", "b", "a")
    with pytest.raises(ValueError, match="the column 'ward', which the rows of train do not have"):
        code(train=rows, test=rows).load(0, "ward")


# --------------------------------------------------------------------------------------------- batches
def test_batches_of_all_kinds_move():
    Pair = namedtuple("Pair", "x y")

    class Graph:
        def to(self, device):
            return ("moved", device)

    batch = {"a": torch.ones(2), "b": [torch.ones(1), "text"], "c": Pair(torch.ones(1), 3), "d": Graph()}
    moved = move_batch(batch, torch.device("meta"))
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["b"][1] == "text"
    assert moved["c"].x.is_meta and moved["c"].y == 3 and isinstance(moved["c"], Pair)
    assert moved["d"] == ("moved", torch.device("meta"))
    assert move_batch((torch.ones(1), None), torch.device("meta"))[0].is_meta


def test_lists_in_mappings_become_tensors():
    batch = collate_rows([{"input_ids": [1, 2], "text": "a"}, {"input_ids": [3, 4], "text": "b"}])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]] and batch["text"] == ["a", "b"]
    with pytest.raises(ValueError, match="cannot be put into one batch .* give collate = a function"):
        collate_rows([{"input_ids": [1, 2]}, {"input_ids": [3]}])


# ------------------------------------------------------------------------------------ model and losses
def test_a_module_is_copied_and_a_function_is_called_with_the_runs_seed():
    net = Mixer()
    copy = code(model=net).network(0)
    assert copy is not net and torch.equal(copy.out.weight, net.out.weight)
    before = torch.get_rng_state()
    first, again, other = (code(model=Mixer).network(seed).out.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(before, torch.get_rng_state())
    same = code(model=lambda: net)
    same.network(0)
    with pytest.raises(ValueError, match="model\\(\\) returned the same network twice"):
        same.network(0)
    with pytest.raises(ValueError, match="model\\(\\) returned a int"):
        code(model=lambda: 3).network(0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (cross_entropies, r"loss returned a tensor of shape \(3,\); it should return the mean loss"),
        (lambda model, batch: 1.0, "loss returned float"),
        (lambda model, batch: torch.tensor(1.0), "a value without a gradient, so nothing would be trained"),
        (None, "a batch is a list; give loss"),
    ],
)
def test_a_loss_of_a_wrong_form(loss, message):
    own = code(loss_function=loss)
    batch = own.collate(own.load(0, None).train, torch.arange(3))
    with pytest.raises(ValueError, match=message):
        own.loss(own.network(0), batch)


def test_the_default_loss_is_the_models():
    class Output:
        def __init__(self, loss):
            self.loss = loss

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1)

        def forward(self, x, labels=None):
            return Output(None if labels is None else (self.a(x) - labels).square().mean())

    own, net = code(loss_function=None), Own()
    batch = {"x": torch.ones(2, 1), "labels": torch.ones(2, 1)}
    assert own.loss(net, batch).dtype == torch.float32
    with pytest.raises(ValueError, match="the model returned a Output without one; give loss"):
        own.loss(net, {"x": torch.ones(2, 1)})


def test_losses_of_rows_are_asked_for():
    own = code()
    assert "give losses = a function of (model, batch) too" in own.losses_obstacle
    assert code(losses_function=cross_entropies).losses_obstacle is None
    batch = own.collate(own.load(0, None).train, torch.arange(3))
    assert code(losses_function=cross_entropies).losses(own.network(0), batch).shape == (3,)
    with pytest.raises(ValueError, match="losses returned a tensor of shape .. for 3 rows"):
        code(losses_function=cross_entropy).losses(own.network(0), batch)


# ---------------------------------------------------------------------------------------------- scores
def score(own, rows=15, size=4, order=None):
    return own.score_rows(own.network(0).eval(), own.load(0, None).test, torch.arange(rows), CPU, size, order)


def test_sums_are_pooled_over_batches():
    with torch.no_grad():
        one, many = score(code(), size=100), score(code(), size=4)
        assert one == many and one.sums["accuracy"][1] == 15
        loss = score(code(metrics={}))
        mean = cross_entropy(
            code(model=(net := Mixer())).network(0).eval(), (Points(15, SHAPE, 2).x, Points(15, SHAPE, 2).y)
        )
        assert score(code(model=net, metrics={})).sums["loss"][0] / 15 == pytest.approx(float(mean), rel=1e-6)
    assert loss.sums["loss"][1] == 15


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (0.5, "returned a float; it should return a sum over the batch and its count"),
        ((1, 2, 3), "returned 3 values"),
        (("1", 2), "the sum '1' and the count 2"),
        ((1.0, 2.5), "the sum 1.0 and the count 2.5"),
        ((1.0, -1), "a whole number of at least 0"),
        ((torch.ones(2), 2), "they should be a number"),
        ((1.0, math.nan), "and the count nan"),
    ],
)
def test_a_metric_of_a_wrong_form(pair, message):
    with pytest.raises(ValueError, match=message):
        check_sum("own", pair)


def test_a_metric_that_counts_nothing_or_is_not_finite():
    assert check_sum("own", (torch.tensor(3), torch.tensor([4]))) == (3.0, 4)
    with pytest.raises(FloatingPointError, match="the sum of the metric 'own' is nan on test rows"):
        check_sum("own", (torch.tensor(math.nan), 4))
    with pytest.raises(ValueError, match="the metric 'own' counted nothing in 15 test rows"):
        score(code(metrics={"own": lambda model, batch: (0.0, 0)}))
    with pytest.raises(ValueError, match="'accuracy' has a sum of 1500.0 over 15"):
        score(code(metrics={"accuracy": lambda model, batch: (100 * len(batch[1]), len(batch[1]))}))


def test_a_sum_with_a_name_of_its_own_is_a_metric():
    sums = Scores({"gain": (6.0, 4), "tp.0": (1, 4), "success": (1, 2), "f1": (2.0, 4)})
    assert compute_metrics(sums) == {"gain": 1.5, "f1": 0.5}
    assert is_higher_better("gain") and not is_higher_better("mse")
    scores = {0: Scores({"gain": (1.0, 1)}), 1: Scores({"gain": (9.0, 3)})}
    up, down = summarize(scores, "gain", 2), summarize(scores, "gain", 2, higher=False)
    assert up["examples_mean"] == 2.5 and (up["worst"], down["worst"]) == (1.0, 3.0)
    assert compute_metrics(pool(scores.values())) == {"gain": 2.5}


def test_labels_are_permuted_where_a_batch_has_them():
    rows = [{"x": torch.randn(*SHAPE), "labels": y % 3} for y in range(9)]
    own = code(test=rows, metrics={"share": lambda model, batch: (int((batch["labels"] == 2).sum()), 9)})
    order = torch.tensor([2, 0, 1])
    assert own.relabel({"labels": torch.tensor([0, 1])}, order)["labels"].tolist() == [2, 0]
    assert score(own, rows=3, order=order).sums["share"][0] == 1
    with pytest.raises(ValueError, match="clients.permute_labels is set, but a batch has no key 'labels'"):
        score(code(), order=order)


# ------------------------------------------------------------------------------------------ the setting
def test_a_table_without_its_objects():
    table = {"model": {"name": "Net"}, "task": {"name": "objects", "objects": {"model": "train.py:Net"}}}
    config = build(table)
    with pytest.raises(
        ConfigError, match=r"were Python objects \(model = train.py:Net\); to go on, pass them to fedlora.resume"
    ):
        config.federation()
    assert config.task.metric == "loss" and not config.task.is_higher_better
    assert ObjectTask("gain").is_higher_better and not ObjectTask("gain", higher=False).is_higher_better


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": {"name": "objects", "metric": "tp"}}, "task.metric is 'tp'; a metric's name has letters"),
        ({"task": {"name": "objects", "metric": "a b"}}, "task.metric is 'a b'"),
        ({"task": {"name": "objects", "train_rows": 3}}, "task.train_rows and task.test_rows cannot be set"),
        ({"task": {"name": "objects"}, "engine": {"name": "flower-simulation"}}, "whose clients are other processes"),
        ({"model": {"name": "Net", "start": "x"}, "task": {"name": "objects"}}, "model.start is set, and the model is"),
        ({"model": {"name": "x", "quantize": "4bit"}, "task": {"name": "objects"}}, "quantise it beforehand"),
        (
            {
                "model": {"name": str(TINY_VIT)},
                "task": {"name": "image-classification", "data": "digits"},
                "clients": {"partition": {"name": "given"}},
            },
            "clients.partition is 'given', which is for the datasets of fedlora.run",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        build({"model": {"name": "Net"}, **settings})
