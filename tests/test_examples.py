"""Every example at toy size; those that name hub ids run on the local copies of the same model and data."""

import csv
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

import fedlora
from fedlora.methods import METHODS
from fedlora.runs.config import read

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))
TOY = ("rounds=2", "training.batch_size=4", "task.train_rows=90", "task.test_rows=30", "engine.threads=1")


def test_there_is_one_for_every_method():
    found = {read(path).table["method"]["name"] for path in EXAMPLES}
    assert found == set(METHODS.names())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_opens_with_its_command(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith((f"# fedlora run examples/{path.name}", f"# fedlora compare examples/{path.name}"))


@pytest.mark.shared
@pytest.mark.parametrize("path", [p for p in EXAMPLES if "banking77" in p.read_text()], ids=lambda path: path.stem)
def test_on_real_text(path, shared):
    places = [f"model.name={shared}/models/minilm-l3-h384-v8k", f"task.data={shared}/data/banking77"]
    rows = [] if "concept" in path.stem else ["clients.partition={name='iid'}"]
    toy = [*TOY, "training.local_steps=1", "clients.count=3", "evaluation.every=2"]
    result = fedlora.run(read(path, [*toy, *places, *rows]))
    assert result.summary["rounds"] == 2
    assert 0 <= result.summary["final"]["clients"]["mean"] <= 1


LANGUAGE = {"shakespeare-roles": "shakespeare_roles", "dolly-categories": "dolly15k"}


@pytest.mark.shared
@pytest.mark.parametrize("path", [p for p in EXAMPLES if "causal-lm" in p.read_text()], ids=lambda path: path.stem)
def test_language_models(path, shared):
    places = [f"model.name={shared}/models/stories260k-llama", f"task.data={shared}/data/{LANGUAGE[path.stem]}"]
    rows = [
        "task.train_rows=1500",
        f"task.test_rows={700 if 'roles' in path.stem else 150}",
        "task.truncation_side=left",
        "task.max_length=96",
    ]
    result = fedlora.run(read(path, [*TOY, *places, *rows, "training.local_steps=1", "clients.count=3"]))
    assert result.summary["rounds"] == 2
    assert 1 < result.summary["final"]["clients"]["mean"] < 512, "better than guessing among 512 tokens"


def test_digits():
    path = next(p for p in EXAMPLES if p.stem.startswith("digits"))
    result = fedlora.run(read(path, [*TOY, "training.local_steps=2", "clients.count=3"]))
    assert result.summary["personal"]


def test_unequal_clients():
    path = next(p for p in EXAMPLES if p.stem.startswith("unequal"))
    rows = ["task.train_rows=200", "task.test_rows=80"]  # twelve clients have some of each
    result = fedlora.run(read(path, [*TOY, *rows, "training.local_steps=2", "rounds=3"]))
    final, records = result.summary["final"]["clients"], result.records
    assert [group["capability"] for group in final["capability"]] == [0.25, 0.5, 0.75, 1.0]
    assert final["each"][10:] == [None, None], "the new ones"
    assert all(len(record["absent"]) == 1 and len(record["cohort"]) == 9 for record in records)
    assert any(record["stragglers"] for record in records)


@pytest.mark.shared
def test_glue_by_name(shared):
    path = next(p for p in EXAMPLES if p.stem.startswith("glue"))
    places = [f"model.name={shared}/models/minilm-l3-h384-v8k", f"task.data={shared}/data/glue_qnli_dev"]
    result = fedlora.run(read(path, [*TOY, *places, "training.local_steps=2", "clients.count=3"]))
    assert result.summary["labels"] == ["entailment", "not_entailment"]
    assert 0 <= result.summary["final"]["global"]["accuracy"] <= 1


@pytest.mark.shared
def test_own_pictures(shared, tmp_path):
    found = load_digits()
    for i, (picture, label) in enumerate(zip(found.images[:90], found.target)):
        folder = tmp_path / ("test" if i >= 60 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 15).astype("uint8")).save(folder / f"{i}.png")
    path = next(p for p in EXAMPLES if p.stem.startswith("images"))
    places = [f"model.name={shared}/models/vit-mini-cifar10", f"task.data={tmp_path}", "clients.partition={name='iid'}"]
    result = fedlora.run(read(path, [*TOY, *places, "training.local_steps=2", "clients.count=3"]))
    assert result.summary["labels"] == list("0123456789")


@pytest.mark.shared
def test_own_csv(shared, tmp_path):
    for split, rows in (("train", 60), ("test", 30)):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "hospital"])
            writer.writerows(
                [f"case {i} is {('fine', 'bad')[i % 2]}", ("fine", "bad")[i % 2], "ABC"[i % 3]] for i in range(rows)
            )
    path = next(p for p in EXAMPLES if p.stem.startswith("csv"))
    places = [f"model.name={shared}/models/minilm-l3-h384-v8k", f"task.data={tmp_path}", "training.batch_size=4"]
    federation = read(path, [*places, "rounds=1"]).federation()
    assert [len(shard.train) for shard in federation.shards] == [20, 20, 20]
    assert [len(shard.test) for shard in federation.shards] == [10, 10, 10]
    assert federation.data.label_names == ("bad", "fine")
