"""A run does not go on with other data or another model than it was begun with, and says what changed."""

import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedlora
from fedlora.engines import inputs
from fedlora.tasks.task import Examples
from tests.fixtures.federation import TINY_VIT, config
from tests.resume.world import alike, stopped

ROWS = [{"image": bytes((i * k) % 256 for k in range(64)), "label": i % 3} for i in range(60)]


@pytest.fixture
def world(tmp_path):
    """A run on files of its own that was broken off after a round: its configuration and its folder."""
    shutil.copytree(TINY_VIT, tmp_path / "model")
    write(tmp_path / "data", ROWS, ROWS[:30])
    made = config(
        f"task={{name='image-classification', data='{tmp_path / 'data'}', image_shape=[8, 8, 1]}}",
        f"model.name='{tmp_path / 'model'}'", "training.local_steps=1", "clients.split={name='iid'}", "rounds=3",
    )  # fmt: skip
    stopped(made, tmp_path / "run", 1)
    return made, tmp_path


def write(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")


def test_the_same_data_goes_on(world):
    made, place = world
    write(place / "data", ROWS, ROWS[:30])  # written anew: what counts is what it holds
    fedlora.resume(place / "run")
    fedlora.run(made, place / "whole")
    assert alike(place / "run", place / "whole")


CHANGES = {  # what the rows become, and what is said
    "rows added": (lambda rows: [*rows, ROWS[4]], "there are 61 training rows, and were 60"),
    "rows removed": (lambda rows: rows[1:], "there are 59 training rows, and were 60"),
    "another order": (lambda rows: rows[::-1], "the training rows are in another order"),
    "another label": (lambda rows: [{**rows[0], "label": 1}, *rows[1:]], "training rows have other labels"),
    "labels swapped": (
        lambda rows: [{**row, "label": [1, 0, 2][row["label"]]} for row in rows], "training rows have other labels"
    ),
    "another content": (lambda rows: [{**rows[0], "image": bytes(64)[1:] + b"x"}, *rows[1:]], "another content"),
    "a new label": (lambda rows: [*rows[:-1], {**rows[-1], "label": 3}], "the labels are 0, 1, 2, 3, and were 0, 1, 2"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_changed_rows_are_refused(what, world):
    _, place = world
    change, sentence = CHANGES[what]
    write(place / "data", change(ROWS), ROWS[:30])
    refused(place, sentence)


def test_changed_test_rows_and_a_changed_model_are_refused(world):
    _, place = world
    write(place / "data", ROWS, ROWS[1:31])
    refused(place, "test rows have another content")
    write(place / "data", ROWS, ROWS[:30])
    weights = load_file(place / "model" / "model.safetensors")
    save_file({key: x * 1.001 for key, x in weights.items()}, place / "model" / "model.safetensors", {"format": "pt"})
    refused(place, "the pretrained model has other weights")


def refused(place, sentence):
    """Whether the run does not go on, for this reason and no other, with nothing written."""
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="was begun with other data or another model") as found:
        fedlora.resume(place / "run")
    assert sentence in str(found.value) and "torch" not in str(found.value)
    assert before == {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}


def texts(rows, labels=None):
    """Rows of tokens, flat as tasks on texts keep them."""
    lengths = torch.tensor([len(row) for row in rows])
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    labels = torch.zeros(len(rows), dtype=torch.int64) if labels is None else torch.tensor(labels)
    golds = tuple({"gold": str(row[0])} for row in rows)
    return Examples({"input_ids": flat, "offsets": offsets, "pad": torch.tensor(0)}, labels, lengths, texts=golds)


@pytest.mark.parametrize(
    ("other", "phrase"),
    [
        (texts([[1, 2], [3], [4, 5, 6]]), []),
        (texts([[3], [1, 2], [4, 5, 6]]), ["the training rows are in another order"]),
        (texts([[1], [2, 3], [4, 5, 6]]), ["training rows have another content"]),
        (texts([[1, 2], [3], [4, 5, 6]], [0, 1, 0]), ["training rows have other labels"]),
        (texts([[1, 2], [3], [4, 5, 6]], [0.0, 0.0, 0.5]), ["training rows have other labels"]),
        (texts([[1, 2], [3], [4, 5, 6], [7]]), ["there are 4 training rows, and were 3"]),
    ],
)
def test_rows_of_tokens(other, phrase):
    before, now = (
        {"base": "", "rows": {"training": inputs.digests(x)}} for x in (texts([[1, 2], [3], [4, 5, 6]]), other)
    )
    assert inputs.changes(before, now) == phrase


def test_a_machine_without_data_knows_its_base_only():
    assert inputs.changes({"base": "a"}, {"base": "a"}) == []
    assert inputs.changes({"base": "a"}, {"base": "b"}) == ["the pretrained model has other weights"]
