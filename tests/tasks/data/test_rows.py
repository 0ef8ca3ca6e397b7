"""Rows from every kind of source, and one sentence for what is wrong with them."""

import gzip
import io
import json

import datasets
import numpy
import pytest
import torch
from PIL import Image

from fedlora.tasks.image_classification import ImageClassification
from fedlora.tasks.text_classification import TextClassification

ROWS = [{"text": f"row number {i} is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(40)]


def write(folder, name, rows=ROWS):
    path = folder / name
    if name.endswith(".csv"):
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return path


@pytest.fixture
def model(shared):
    return str(shared / "models" / "minilm-l3-h384-v8k")


pytestmark = pytest.mark.shared


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_files_and_folders(tmp_path, model, ending):
    write(tmp_path, f"train.{ending}")
    write(tmp_path, f"test.{ending}", ROWS[:10])
    found = TextClassification(str(tmp_path)).load(model, 0)
    assert (len(found.train), len(found.test), found.label_names) == (40, 10, ("0", "1"))
    single = TextClassification(str(tmp_path / f"train.{ending}"))
    a, b = single.load(model, 0), single.load(model, 1)
    assert (len(a.train), len(a.test)) == (32, 8)
    assert not torch.equal(a.test.features["input_ids"], b.test.features["input_ids"]), "the seed cuts"


def test_saved_datasets(tmp_path, model):
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:6]))
    both.save_to_disk(str(tmp_path / "d"))
    assert len(TextClassification(str(tmp_path / "d")).load(model, 0).test) == 6


def test_text_labels_are_sorted_and_some_can_be_kept(tmp_path, model):
    rows = [{"text": f"a {i}", "label": "cab"[i % 3]} for i in range(30)]
    write(tmp_path, "train.jsonl", rows)
    write(tmp_path, "test.jsonl", rows[:9])
    found = TextClassification(str(tmp_path)).load(model, 0)
    assert found.label_names == ("a", "b", "c")
    assert found.train.labels[:3].tolist() == [2, 0, 1]
    kept = TextClassification(str(tmp_path), labels=["a", "c"]).load(model, 0)
    assert kept.label_names == ("a", "c")
    assert set(kept.train.labels.tolist()) == {0, 1}
    assert len(kept.train) == 20


def test_batches_are_padded_to_their_own_longest_row(tmp_path, model):
    rows = [{"text": "word " * (1 + i), "label": i % 2} for i in range(20)]
    write(tmp_path, "train.jsonl", rows)
    task = TextClassification(str(tmp_path / "train.jsonl"), max_length=12)
    d = task.load(model, 0).train
    rows = d.lengths.argsort()[:3]
    batch = task.collate(d, rows)
    assert batch["input_ids"].shape == (3, int(d.lengths[rows].max()))
    assert torch.equal(batch["attention_mask"].sum(1), d.lengths[rows])
    assert int(d.lengths.max()) == 12, "longer texts are cut"
    padded = TextClassification(str(tmp_path / "train.jsonl"), max_length=12, pad_to_max_length=True)
    assert padded.collate(d, rows)["input_ids"].shape == (3, 12)
    network = task.network(model, 2, 0).eval()
    with torch.inference_mode():
        torch.testing.assert_close(task.outputs(network, batch), padded.outputs(network, padded.collate(d, rows)), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_pairs(shared, model):
    found = TextClassification(str(shared / "data" / "glue_qnli_dev"), train_rows=50, test_rows=20).load(model, 0)
    assert len(found.train) == 50
    first = found.train.features["input_ids"][: int(found.train.lengths[0])].tolist()
    assert first.count(first[-1]) == 2, "question [SEP] sentence [SEP]"


BAD = {
    "missing column": (
        [{"txt": "a", "label": 0}, {"txt": "b", "label": 1}] * 9,
        {"text": "text"},
        r"no column 'text'.*did you mean 'txt'",
    ),
    "no text column": (
        [{"x": "a", "label": 0}, {"x": "a", "label": 1}] * 9,
        {},
        r"no text column among x, label",
    ),
    "missing value": ([{"text": "a", "label": 0}, {"text": None, "label": 1}] * 9, {}, r"has \d+ missing values"),
    "empty text": ([{"text": "a", "label": 0}, {"text": " ", "label": 1}] * 9, {}, r"\d+ empty texts"),
    "not text": ([{"text": 3, "label": 0}, {"text": 4, "label": 1}] * 9, {}, r"holds [34], which is not text"),
    "negative": (
        [{"text": "a", "label": -1}, {"text": "b", "label": 1}] * 9,
        {"label_names": ["no", "yes"]},
        r"holds -1 in the training rows, which matches no label; no label name is a number",
    ),
    "one label": ([{"text": "a", "label": 0}] * 9, {}, r"only 1 label"),
    "outside": (ROWS, {"label_names": ["only one", "two"], "label": "wrong"}, r"no column 'wrong'"),
    "beyond": (
        [*ROWS, {"text": "a", "label": 7}],
        {"label_names": ["no", "yes"]},
        r"holds 7 in the training rows, which matches no label; .* positions, 0 = no, 1 = yes; correct the rows",
    ),
    "kept but not there": (ROWS, {"labels": [0, 5]}, r"task.labels has 5, which is no label; labels are 0, 1"),
    "one kept": (ROWS, {"labels": [0]}, r"task.labels keeps only 1 label"),
    "no rows": (
        ROWS,
        {"label_names": ["0", "1", "2", "3"], "labels": [2, 3]},
        "the training split has no rows with the labels of task.labels",
    ),
    "list labels": ([{"text": "a", "label": [0]}, {"text": "b", "label": [1]}] * 9, {}, r"holds \[[01]\] in the"),
    "a single row": (ROWS[:1], {}, r"holds 1 row; it is cut into training and test rows"),
    "too long": (
        [{"text": "a " * 600, "label": i % 2} for i in range(9)],
        {"max_length": 700},
        r"reads at most \d+; set",
    ),
    "too wide": (
        ROWS,
        {"max_length": 700, "pad_to_max_length": True},
        r"a text comes to 700 tokens, but .* at most \d+",
    ),
    "three columns": (ROWS, {"text": ["text", "text", "text"]}, r"task.text names 3 columns"),
}


@pytest.mark.parametrize("rows,settings,sentence", BAD.values(), ids=BAD)
def test_mistakes(tmp_path, model, rows, settings, sentence):
    path = write(tmp_path, "train.jsonl", rows)
    with pytest.raises(ValueError, match=sentence) as caught:
        TextClassification(str(path), **settings).load(model, 0)
    assert "\n" not in str(caught.value)


def test_training_rows_alone_are_cut_in_two(tmp_path, model):
    write(tmp_path, "train.jsonl", ROWS * 5)
    found = TextClassification(str(tmp_path)).load(model, 0)
    assert len(found.train) + len(found.test) == 5 * len(ROWS) and len(found.test) == len(ROWS)


def test_places_that_are_wrong(tmp_path, model):
    (tmp_path / "empty").mkdir()
    for data, sentence in (("./none", "no data at"), (str(tmp_path / "empty"), "has no data")):
        with pytest.raises(ValueError, match=sentence):
            TextClassification(data).load(model, 0)
    write(tmp_path, "train.jsonl")
    with pytest.raises(ValueError, match=r"no split 'dev'; set task.test_split to one of: train"):
        TextClassification(str(tmp_path), test_split="dev").load(model, 0)
    broken = {
        "broken.jsonl": '{"text": "a", "label"',
        "broken.parquet": "no parquet",
        "broken.csv": "\0\n",
        "e.jsonl": "",
    }
    for name, content in broken.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=r"could not be read as (json|parquet|csv)|is empty") as caught:
            TextClassification(str(tmp_path / name)).load(model, 0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [0, -1])
def test_row_counts_are_positive(rows):
    with pytest.raises(ValueError, match=f"task.train_rows is {rows}; it must be at least 1"):
        TextClassification("x", train_rows=rows)
    with pytest.raises(ValueError, match=f"task.test_rows is {rows}; it must be at least 1"):
        ImageClassification("x", test_rows=rows)


def test_pictures_in_folders_and_bytes(tmp_path, shared):
    for split in ("train", "test"):
        for label in ("dark", "light"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                value = 30 if label == "dark" else 220
                Image.new("RGB", (11, 17), (value, value, value + i)).save(tmp_path / split / label / f"{i}.png")
    found = ImageClassification(str(tmp_path)).load("demo-vit", 0)
    assert found.label_names == ("dark", "light")
    assert found.train.features["pixels"].shape == (6, 1, 8, 8)
    assert found.train.features["pixels"][found.train.labels == 0].max() < 40
    real = ImageClassification(str(shared / "data" / "femnist_digits"), train_rows=30, test_rows=10)
    d = real.load(str(shared / "models" / "vit-mini-cifar10"), 0, "client")
    assert d.train.features["pixels"].shape == (30, 3, 32, 32)
    assert len(set(d.train.groups)) > 1
    batch = real.collate(d.train, torch.arange(4))
    assert batch["pixel_values"].dtype == torch.float32
    assert -3 < float(batch["pixel_values"].min()) < float(batch["pixel_values"].max()) < 3


def test_pictures_that_are_wrong(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    rows = [{"image": numpy.zeros(16, dtype="uint8").tobytes(), "label": i % 2} for i in range(10)]
    path = str(write(tmp_path, "train.parquet", rows))
    with pytest.raises(ValueError, match="no known picture format; replace it .* set task.image_shape"):
        ImageClassification(path).load("demo-vit", 0)
    with pytest.raises(ValueError, match=r"an image of 16 bytes; the shape \[4, 5, 1\] needs 20"):
        ImageClassification(path, image_shape=[4, 5, 1]).load("demo-vit", 0)
    assert ImageClassification(path, image_shape=[4, 4, 1]).load("demo-vit", 0).train.features["pixels"].shape[1:] == (
        1,
        8,
        8,
    )
