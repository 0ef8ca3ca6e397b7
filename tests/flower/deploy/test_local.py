"""`fedlora flower local`: parties with files of their own, which agree on the labels or are named with the reason."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import datasets
import tomli_w
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from fedlora.flower.deploy.node_config import apply_node_config
from fedlora.runs.config import build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower")]

STARS = ["1", "2", "3"]
TEXTS = ["NA", "très bon; merci", "none, at all", "null", "plat", "moyen", "n/a", "été", "hiver"] * 2
LABELS = [STARS[i % 3] for i in range(len(TEXTS))]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def table(tmp_path):
    """A configuration of four parties with data of their own, on a tiny BERT."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **small)).save_pretrained(tmp_path / "bert")
    return {
        "rounds": 1, "model": {"name": str(tmp_path / "bert"), "targets": ["query", "value"]},
        "task": {"name": "text-classification", "data": "own", "label_names": STARS, "train_split": "all", "test_split": "all"},
        "method": {"name": "fedit"}, "clients": {"count": 4, "partition": {"name": "own"}},
        "training": {"local_steps": 1, "batch_size": 4}, "evaluation": {"measure": False},
        "flower": {"min_clients": 4, "repair_timeout": 2.0, "retry": 1.0, "poll": 0.1},
    }  # fmt: skip


@pytest.fixture
def parties(tmp_path):
    """The same rows in four kinds of file: numbers, a semicolon and Latin-1, JSON texts, and a ClassLabel's order."""
    quoted = [f'"{text}"' for text in TEXTS]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *map(",".join, zip(quoted, LABELS))]))
    (tmp_path / "b.csv").write_text("\n".join(["label;text", *map(";".join, zip(LABELS, quoted))]), "latin-1")
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    feature = datasets.ClassLabel(names=STARS[::-1])
    numbers = {"text": TEXTS, "label": [feature.str2int(label) for label in LABELS]}
    datasets.Dataset.from_dict(numbers).cast_column("label", feature).to_parquet(tmp_path / "d.parquet")
    own = [{"data": str(tmp_path / name)} for name in ("a.csv", "b.csv", "c.jsonl", "d.parquet")]
    own[1] |= {"encoding": "latin-1", "delimiter": ";"}
    return [{"client": client, "task": task} for client, task in enumerate(own)]


def run(folder, table, parties):
    (folder / "fed.toml").write_text(tomli_w.dumps(table))
    (folder / "parties.toml").write_text(tomli_w.dumps({"party": parties}))
    words = ["flower", "local", "fed.toml", "--parties", "parties.toml", "--insecure", "--out", "run"]
    return subprocess.run([sys.executable, "-m", "fedlora", *words], cwd=folder, capture_output=True, text=True)


def test_parties_with_numbers_texts_and_a_classlabel_train_on_the_same_labels(table, parties, tmp_path):
    table["flower"] |= {"min_clients": 2, "secure_aggregation": True, "secure_threshold": 4}
    done = run(tmp_path, table, parties)
    assert done.returncode == 0, done.stderr
    assert "note: flower.min_clients is 2; flower.secure_aggregation needs 4 clients" in done.stderr
    for client, party in enumerate(parties):
        task = {f"task.{key}": value for key, value in party["task"].items()}
        data = build(apply_node_config(table, {"client": client, **task})).federation(client).data
        assert [data.label_names[i] for i in data.train.labels.tolist()] == LABELS, party
        assert f"round 1, client {client}: joined; its labels are matched by name" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["label_maps"] == [{"clients": [0, 1, 2, 3], "by": "name", "classes": dict(zip(STARS, STARS))}]


def test_two_of_three_parties_with_a_broken_file_and_with_other_labels_end_the_run_with_the_reasons(
    table, parties, tmp_path
):
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": "a", "label": x}) for x in ("good", "bad")))
    (tmp_path / "b.csv").write_text("text;label\na;1\nb;2;2\n")
    table["clients"]["count"], table["flower"]["min_clients"] = 3, 2
    done = run(tmp_path, table, parties[:3])
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "1 of 3 clients can take part, and it needs 2" in last
    for client, reason in enumerate(["line 3", "which match no label; the labels are 1, 2, 3"], 1):
        assert f"(client {client}: it could not load its model and data (ValueError); host.log in its state" in last
        assert re.search(
            f"Client {client}'s log, .*/run/nodes/{client}/host.log, ends with .ValueError: .*{reason}", last
        )
    assert not (tmp_path / "run" / "metrics.jsonl").read_text(), "nobody has trained"
