"""A learning rate that is far too high ends in one sentence, whatever it breaks first, and never in a figure."""

import pytest

import fedlora
from fedlora.comparison import compare, for_label, rows
from fedlora.config import build

TABLE = {
    "rounds": 1,
    "model": {"name": "demo-vit"},
    "task": {"name": "image-classification", "data": "digits", "train_rows": 60, "test_rows": 20},
    "clients": {"count": 3},
    "adapter": {"name": "lora", "rank": 4},
    "training": {"local_steps": 1, "batch_size": 4, "learning_rate": 1e30},
}


@pytest.mark.parametrize(
    "method, sentence",
    [
        ("fedit", r"what the model says of test rows is no number"),  # its accuracy would be that of the first label
        ("svd", r"what clients trained is too large to be combined or measured"),
        ("flora-na", r"what clients trained is too large to be combined or measured"),
    ],
)
def test_one_step_is_enough(method, sentence):
    with pytest.raises(FloatingPointError, match=f"{sentence}.*; lower training.learning_rate"):
        fedlora.run(build(for_label(TABLE, method)))


@pytest.mark.parametrize("method", ["fedit", "fedrot-lora", "flexlora"])
def test_weights_that_are_no_longer_finite_leave_no_client(method):
    """The loss of the last step does not know what that step did."""
    table = {**TABLE, "rounds": 2, "training": {**TABLE["training"], "learning_rate": 1e12}}
    with pytest.raises(FloatingPointError, match="client 0's weights are no longer finite in round 2; lower training"):
        fedlora.run(build(for_label(table, method)))


def test_a_comparison_counts_it_and_goes_on(tmp_path):
    own = {"compare": {"svd": {"training": {"learning_rate": 1e-3}}}}
    found = rows(compare({**TABLE, **own}, ["fedit", "flora-na", "svd"], [0], tmp_path / "out"))
    assert [row["diverged"] for row in found] == [1, 1, 0]
    assert found[0]["global"] is None and found[2]["global"]["mean"] > 0
