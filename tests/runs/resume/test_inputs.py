"""A run does not go on with other data or another model than it was begun with, and says what changed."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedlora
from fedlora.engines import inputs
from fedlora.export.peft import export_model
from fedlora.runs.folder import RunFolder
from fedlora.tasks._base import Examples
from tests.fixtures.own_files import ROWS, on_files, reset, write
from tests.fixtures.resume import alike, stopped


@pytest.fixture
def world(tmp_path):
    """A run on files of its own that was broken off after a round: its configuration and its folder."""
    made = on_files(tmp_path, "rounds=3")
    stopped(made, tmp_path / "run", 1)
    return made, tmp_path


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


SETTINGS = {  # what config.json becomes, and what is said
    "an activation": ({"hidden_act": "relu"}, 'says that hidden_act is "relu", and was its default'),
    "a number": ({"layer_norm_eps": 0.5}, "layer_norm_eps is 0.5, and was its default"),
    "two of them": (
        {"hidden_act": "relu", "attention_probs_dropout_prob": 0.25},
        'attention_probs_dropout_prob is 0.25, and was its default, hidden_act is "relu", and was its default',
    ),
    "a setting of somebody's own": ({"scales": {"first": 2}}, "scales.first is 2, and was its default"),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_a_changed_config_of_the_same_weights_is_refused(what, world):
    _, place = world
    more, sentence = SETTINGS[what]
    reset(place / "model", more)
    refused(place, sentence)


def test_who_wrote_a_model_and_what_it_calls_its_labels_change_nothing(world):
    made, place = world
    names = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    reset(place / "model", {"transformers_version": "4.0.0", "_name_or_path": "x", "hidden_act": "gelu", **names})
    fedlora.resume(place / "run")
    fedlora.run(made, place / "whole")
    assert alike(place / "run", place / "whole")


def test_more_settings_than_a_sentence_holds():
    before, now = ({"base": "", "settings": dict.fromkeys("abcde", x)} for x in "01")
    (text,) = inputs.describe_changes(before, now)
    assert text == (
        "the config.json of the pretrained model says that a is 1, and was 0, b is 1, and was 0, c is 1, and was 0, "
        "and 2 more differ"
    )
    assert inputs.describe_changes({"base": "", "settings": {"a": "1"}}, {"base": "", "settings": {}}) == [
        "the config.json of the pretrained model says that a is its default, and was 1"
    ]


def test_another_adapter_in_the_place_of_model_start_is_refused(world):
    pytest.importorskip("peft")
    made, place = world
    for name, seed in (("first", 1), ("second", 2)):
        one = replace(made, seed=seed, rounds=1)
        fedlora.run(one, place / name)
        export_model(RunFolder.open(place / name), place / f"{name}-adapter")
    shutil.copytree(place / "first-adapter", place / "start")
    shutil.rmtree(place / "run")
    begun = replace(made, model=replace(made.model, start=str(place / "start")))
    stopped(begun, place / "run", 1)
    shutil.rmtree(place / "start")
    shutil.copytree(place / "second-adapter", place / "start")
    refused(place, "model.start holds another adapter")
    shutil.rmtree(place / "start")
    shutil.copytree(place / "first-adapter", place / "start")
    assert fedlora.resume(place / "run").summary["rounds"] == 3


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
        {"base": "", "rows": {"training": inputs.digest_split(x)}} for x in (texts([[1, 2], [3], [4, 5, 6]]), other)
    )
    assert inputs.describe_changes(before, now) == phrase


def test_a_machine_without_data_knows_its_base_only():
    assert inputs.describe_changes({"base": "a"}, {"base": "a"}) == []
    assert inputs.describe_changes({"base": "a"}, {"base": "b"}) == ["the pretrained model has other weights"]
