"""All GLUE tasks by name: columns, labels, metrics; hidden labels are refused; MNLI's two test sets are both scored."""

import json

import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

import fedlora
from fedlora.engines.clients import Clients
from fedlora.runs.config import build
from fedlora.schema import ConfigError
from fedlora.tasks.glue import SUBSETS, Glue
from fedlora.tasks.metrics.scores import compute_metrics

pytestmark = pytest.mark.shared

# The benchmark's real column layout, a row of each task.
ROWS = {
    "cola": {"sentence": "Our friends won't buy this analysis.", "label": 1},
    "sst2": {"sentence": "hide new secretions from the parental units", "label": 0},
    "mrpc": {"sentence1": "He told them.", "sentence2": "They were told by him.", "label": 1},
    "qqp": {"question1": "How is a pearl made?", "question2": "How are pearls made?", "label": 1},
    "stsb": {"sentence1": "A plane is taking off.", "sentence2": "An air plane takes off.", "label": 5.0},
    "mnli": {"premise": "One of our number will see to it.", "hypothesis": "A member will see to it.", "label": 0},
    "qnli": {"question": "When did the war begin?", "sentence": "It began in 1914.", "label": 0},
    "rte": {"sentence1": "Nobody was hurt.", "sentence2": "Someone was hurt.", "label": 1},
    "wnli": {"sentence1": "It is stuck.", "sentence2": "The carrot is stuck.", "label": 1},
}


def labelled(name, count, shift=0):
    """Rows whose texts tell their label, in the task's own columns."""
    kinds = SUBSETS[name].labels
    for i in range(count):
        label = (i + shift) % (len(kinds) if kinds else 6)
        words = ("red apple", "blue car", "green sea", "old house", "dark night", "warm bread")[label]
        texts = dict.fromkeys(SUBSETS[name].text, f"{words} number {i}")
        yield {**texts, "label": label if kinds else label * 0.9, "idx": i}


def write(folder, name, rows):
    """The splits as GLUE has them: hidden labels in the test split."""
    folder.mkdir(exist_ok=True)
    splits = {"train": rows, **dict.fromkeys(SUBSETS[name].tests, 30)}
    for at, (split, count) in enumerate(splits.items()):
        lines = (json.dumps(row) + "\n" for row in labelled(name, count, at))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    hidden = [{**row, "label": -1} for row in labelled(name, 6)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hidden))
    return str(folder)


@pytest.fixture
def model(shared):
    return str(shared / "models" / "minilm-l3-h384-v8k")


def table(model, name, data, **more):
    return {
        "rounds": 1,
        "model": {"name": model},
        "task": {"name": "glue", "subset": name, "data": data, "max_length": 24},
        "clients": {"count": 2, "partition": {"name": "iid"}},
        "adapter": {"name": "lora", "rank": 2},
        "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 5e-3, "precision": "float32"},
        "evaluation": {"measure": False},
        **more,
    }


@pytest.mark.parametrize("name", SUBSETS)
def test_every_name_has_the_benchmarks_columns_and_labels(name):
    assert set(ROWS[name]) == {*SUBSETS[name].text, "label"}
    assert (SUBSETS[name].labels is None) == isinstance(ROWS[name]["label"], float)


REPORTED = {
    "cola": {"accuracy", "loss", "matthews", "f1"},
    "mrpc": {"accuracy", "loss", "matthews", "f1"},
    "qqp": {"accuracy", "loss", "matthews", "f1"},
    "stsb": {"pearson", "spearman", "mse"},
    "mnli": {"accuracy", "loss", "accuracy_mismatched"},
}
METRIC = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}


@pytest.mark.parametrize("name", SUBSETS)
def test_every_task_runs_by_name_with_its_metric(name, model, tmp_path):
    config = build(table(model, name, write(tmp_path / "d", name, 40)))
    result = fedlora.run(config, tmp_path / "run")
    assert result.summary["metric"] == {"name": METRIC.get(name, "accuracy"), "higher": True}
    reported = REPORTED.get(name, {"accuracy", "loss"})
    assert set(result.summary["final"]["global"]) == set(result.summary["final"]["clients"]["figures"]) == reported
    names = SUBSETS[name].labels
    assert result.summary["labels"] == list(names or ["score"])
    again = fedlora.runs.config.read(tmp_path / "run" / "config.toml")
    assert again.task == config.task, "the settings that were written are whole"


def test_the_figures_are_scikit_learns():
    draws = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(40, 2, generator=draws), torch.randint(2, (40,), generator=draws)
    found = outputs.argmax(1)
    assert compute_metrics(Glue(subset="mrpc").scores(outputs, labels))["f1"] == pytest.approx(f1_score(labels, found))
    cola = compute_metrics(Glue(subset="cola").scores(outputs, labels))
    assert cola["matthews"] == pytest.approx(matthews_corrcoef(labels, found))


def test_mnli_is_scored_on_both_sets_each_by_itself(model, tmp_path):
    data = write(tmp_path / "d", "mnli", 60)
    federation = build(table(model, "mnli", data)).federation()
    test, task = federation.data.test, federation.task
    assert test.sets.tolist() == [0] * 30 + [1] * 30
    for shard in Clients(count=20).shards(federation.data, 0):
        assert set(test.sets[shard.test].tolist()) == {0, 1}, "every client is tested on both, however few its rows"
    network = federation.model.network.eval()
    federation.model.load(federation.model.initial(0))
    with torch.no_grad():
        outputs = task.evaluate(network, test, torch.arange(60), torch.device("cpu"))
        both = compute_metrics(task.scores(outputs, test.labels))
        for split, figure in (("matched", "accuracy"), ("mismatched", "accuracy_mismatched")):
            alone = Glue(data, subset="mnli", test_split=f"validation_{split}", max_length=24)
            rows = alone.load(model, 0).test
            own = alone.scores(alone.evaluate(network, rows, torch.arange(30), torch.device("cpu")), rows.labels)
            assert compute_metrics(own)["accuracy"] == both[figure]
            assert "accuracy_mismatched" not in compute_metrics(own)
    assert 0 <= both["accuracy"] <= 1
    fake = torch.cat([torch.eye(3).repeat(20, 1), torch.arange(2).repeat_interleave(30)[:, None]], 1)
    right = torch.cat([torch.arange(3).repeat(10), torch.zeros(30, dtype=torch.int64)])
    told = compute_metrics(task.scores(fake, right))
    assert told["accuracy"] == 1 and told["accuracy_mismatched"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no rows of 'validation_matched'"):
        task.scores(fake[30:], right[30:])


@pytest.mark.parametrize("name", ["mrpc", "stsb"])
def test_hidden_labels_are_refused(name, model, tmp_path):
    task = Glue(write(tmp_path / "d", name, 20), subset=name, test_split="test")
    with pytest.raises(ValueError, match=r"split 'test' of GLUE's \w+ has the label -1.*hidden") as caught:
        task.load(model, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({}, "task.subset is missing; it is one of cola, sst2"),
        ({"subset": "mrcp"}, "no GLUE task 'mrcp'; did you mean 'mrpc'"),
        ({"subset": "stsb", "metric": "f1"}, "task.metric is 'f1'; here it is 'pearson' or"),
        ({"subset": "mnli", "metric": "f1"}, "task.metric is 'f1', which needs two labels; there are 3"),
        ({"subset": "rte", "max_length": 0}, "task.max_length is 0"),
        ({"subset": "rte", "label_names": ["a"]}, "label_names"),
    ],
)
def test_mistakes(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build({"model": {"name": "x"}, "task": {"name": "glue", **settings}})


def test_another_tasks_columns_are_no_rows_of_this_one(model, tmp_path):
    """QNLI's rows under MRPC's name would be scored as paraphrases, with the labels turned round."""
    data = write(tmp_path / "rows", "qnli", 8)
    with pytest.raises(ValueError, match=r"no column 'sentence1' \(of GLUE's mrpc; task.text names others\)"):
        Glue(data=data, subset="mrpc").load(model, 0)
    named = Glue(data=data, subset="mrpc", text=["question", "sentence"])
    assert len(named.load(model, 0).train) == 8


def test_the_order_of_labels_is_glues_where_they_are_words(model, tmp_path):
    for split in ("train", "validation"):
        rows = [
            {"sentence1": f"a {i}", "sentence2": "b", "label": ("not_entailment", "entailment")[i % 2]}
            for i in range(9)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, first in (("rte", 1), ("wnli", 0)):
        found = Glue(str(tmp_path), subset=name).load(model, 0)
        assert int(found.train.labels[0]) == first
        assert found.label_names == SUBSETS[name].labels


def test_a_party_that_has_its_own_rows_needs_no_label_names(model):
    table_ = table(model, "rte", "none", clients={"count": 2, "partition": {"name": "own"}})
    assert build(table_).federation(combines=True).label_names == ("entailment", "not_entailment")


def test_real_questions(model, shared):
    found = Glue(str(shared / "data" / "glue_qnli_dev"), subset="qnli", train_rows=40, test_rows=20).load(model, 0)
    assert (len(found.train), len(found.test)) == (40, 20)
