"""A folder's splits: the files that are rows, in order, from one place; everything else is no split or is refused."""

import json

import datasets
import pytest
from PIL import Image

from fedlora.tasks.data import rows as source
from fedlora.tasks.data.tables import TextFormat

ROWS = [{"text": f"row {i}", "label": i % 2} for i in range(6)]


def write(folder, name, rows=ROWS):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif name.endswith(".csv"):
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(folder / name)


def texts(folder, train="train", test="test"):
    return tuple(list(split["text"]) for split in source.load_splits(str(folder), None, train, [test], 0))


ALL, SOME = [row["text"] for row in ROWS], [row["text"] for row in ROWS[:2]]
LAYOUTS = {  # files of all rows, and of two of them
    "files": (["train.csv"], ["test.jsonl"]),
    "a folder data": (["data/train.csv"], ["data/test.csv"]),
    "lines in a folder data": (["data/train.jsonl"], ["data/test.jsonl"]),
    "folders of a split each": (["train/rows.csv"], ["test/rows.csv"]),
    "a copy of the hub": (["data/train-00000-of-00001.parquet"], ["data/test-00000-of-00001.parquet"]),
    "another copy of the hub": (["default/train-00000-of-00001.parquet"], ["default/test-00000-of-00001.parquet"]),
}


@pytest.mark.parametrize("about", [[], ["dataset_infos.json"], ["README.md", ".train.csv", "meta.json", "dataset_info.json", "config.json", "metadata.csv"]], ids=len)  # fmt: skip
@pytest.mark.parametrize("train,test", LAYOUTS.values(), ids=LAYOUTS)
def test_files_about_the_rows_are_no_splits(tmp_path, train, test, about):
    for name in train:
        write(tmp_path, name)
    for name in test:
        write(tmp_path, name, ROWS[:2])
    for name in about:
        (tmp_path / name).write_text("{}")
    assert texts(tmp_path) == (ALL, SOME)
    assert sorted(source.load_data(str(tmp_path), None, TextFormat())) == ["test", "train"]


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("mark", ["", "-a09b74b3ef9c3b56"])
def test_shards_are_one_split(tmp_path, ending, mark):
    if mark and ending != "parquet":
        mark = "-0123456789abcdef"
    for number in (1, 0, 2):
        write(tmp_path, f"train-0000{number}-of-00003{mark}.{ending}", ROWS[2 * number : 2 * number + 2])
    write(tmp_path, "test.csv", ROWS[:2])
    assert texts(tmp_path) == (ALL, SOME)


def test_types_are_those_of_all_shards(tmp_path):
    write(tmp_path, "train-00000-of-00002.csv", ROWS[:3])
    write(tmp_path, "train-00001-of-00002.csv", [{"text": "x", "label": "01"}])
    write(tmp_path, "test.csv")
    train, _ = source.load_splits(str(tmp_path), None, "train", ["test"], 0)
    assert list(train["label"]) == ["0", "1", "0", "01"]


REFUSED = {
    "two kinds of file": (["train.csv", "train.jsonl"], "several files for the split 'train', train.csv and train.jsonl"),
    "packed and not": (["train.jsonl", "train.json"], "several files for the split 'train'"),
    "a file and a shard": (["train.csv", "train-00000-of-00001.csv"], "several files for the split 'train'"),
    "a shard is missing": (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], "2 files of the 3 shards .* number 1 is missing"),
    "shards of two sets": (["train-00000-of-00002.csv", "train-00000-of-00001.csv"], "several files for the split"),
    "shards of two writers": (["train-00000-of-00001-0123456789abcdef.csv", "train-00000-of-00001-1123456789abcdef.csv"], "some are there twice"),
    "here and in data": (["train.csv", "data/train.csv"], "the split 'test' in test.csv and the split 'train' in folders"),
    "here and in its folder": (["train/rows.csv"], "the split 'test' in test.csv and the split 'train' in folders"),
    "shards of other columns": (["train-00000-of-00002.csv", "train-00001-of-00002.csv"], None),
}  # fmt: skip


@pytest.mark.parametrize("names,sentence", REFUSED.values(), ids=REFUSED)
def test_ambiguous_folders_are_refused(tmp_path, names, sentence):
    for name in [*names, "test.csv"]:
        write(tmp_path, name)
    if sentence is None:
        (tmp_path / names[1]).write_text("label,text\n1,a\n")
        sentence = "its columns are label, text, and train-00000-of-00002.csv has text, label"
    with pytest.raises(ValueError, match=sentence):
        texts(tmp_path)
    if "folders" not in sentence:
        assert texts(tmp_path, "test", "test") == (ALL, ALL), "a split that is clear can be had"


def test_tables_beside_pictures(tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            picture(tmp_path, f"{split}/{label}/0.png")
    write(tmp_path, "labels.csv")
    write(tmp_path, "notes.jsonl")
    found = source.load_splits(str(tmp_path), None, "train", ["test"], 0)
    assert [split.features["label"].names for split in found] == [["cat", "dog"]] * 2
    write(tmp_path, "train.csv")
    with pytest.raises(ValueError, match="the split 'train' in train.csv and the split 'test' in folders of its own"):
        texts(tmp_path)


def test_folders_of_other_things_beside_files(tmp_path):
    write(tmp_path, "train.csv")
    write(tmp_path, "test.csv", ROWS[:2])
    write(tmp_path, "old/rows.csv")
    picture(tmp_path, "figures/a.png")
    assert texts(tmp_path) == (ALL, SOME)


def test_names_are_whole_names(tmp_path):
    """What stands before the first dot is no name: the backup is a split of its own."""
    write(tmp_path, "train.csv")
    write(tmp_path, "train.backup.csv", ROWS[:1])
    write(tmp_path, "test.csv", ROWS[:2])
    assert texts(tmp_path) == (ALL, SOME)
    assert texts(tmp_path, "train.backup") == (ALL[:1], SOME)


def test_what_a_copy_of_the_hub_says_of_its_files(tmp_path):
    """Its README names files, a delimiter and labels; what is not understood is refused by name."""
    (tmp_path / "en").mkdir()
    for split, rows in (("a", "x, y|yes\nz|no\n"), ("b", "NA|no\n")):
        (tmp_path / "en" / f"{split}.csv").write_text("text|label\n" + rows)
    files = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: en/a.csv}\n  - {split: test, path: en/b.csv}\n"
    labels = "dataset_info:\n  features:\n  - {name: text, dtype: string}\n  - name: label\n    dtype:\n      class_label:\n        names: {'0': 'yes', '1': 'no'}\n"
    (tmp_path / "README.md").write_text(f"---\n{files}  sep: '|'\n{labels}---\n")
    train, test = source.load_splits(str(tmp_path), None, "train", ["test"], 0)
    assert (list(train["text"]), list(test["text"])) == (["x, y", "z"], ["NA"])
    assert (list(train["label"]), train.features["label"].names) == ([0, 1], ["yes", "no"])
    (tmp_path / "en" / "b.csv").write_text("text|label\nNA|2\n")
    with pytest.raises(ValueError, match="column 'label' holds 2, and the README .* names the labels yes, no"):
        source.load_splits(str(tmp_path), None, "train", ["test"], 0)
    for name in "ab":
        (tmp_path / "en" / f"{name}.csv").write_text("text|label\nx|1\ny|2\n")
    (tmp_path / "README.md").write_text(
        f"---\n{files}  sep: '|'\n{labels}---\n".replace("'yes'", "'1'").replace("'no'", "'2'")
    )
    train, _ = source.load_splits(str(tmp_path), None, "train", ["test"], 0)
    assert [train.features["label"].names[i] for i in train["label"]] == ["1", "2"], "by name, not by position"
    (tmp_path / "en" / "a.csv").write_text("text|label\nx|0\ny|1\n")
    with pytest.raises(ValueError, match="column 'label' holds 0, and the README .* names the labels 1, 2"):
        source.load_splits(str(tmp_path), None, "train", ["test"], 0)
    (tmp_path / "README.md").write_text(f"---\n{files}  skiprows: 1\n---\n")
    with pytest.raises(ValueError, match="README of .* sets 'skiprows' for its csv files, which is not understood"):
        source.load_splits(str(tmp_path), None, "train", ["test"], 0)


def test_an_encoding_holds_for_all_files(tmp_path):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_bytes("text;label\nKöln;1\n".encode("latin-1"))
    form = TextFormat("latin-1", ";")
    found = source.load_splits(str(tmp_path), None, "train", ["test"], 0, form)
    assert [list(split["text"]) for split in found] == [["Köln"]] * 2
