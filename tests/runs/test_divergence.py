"""A learning rate that is far too high ends in one sentence, whatever it breaks first, and never in a figure."""

import pytest
import torch

import fedlora
from fedlora.api import compare
from fedlora.engines.loop import explain_overflow
from fedlora.runs.compare import for_label
from fedlora.runs.comparison import comparison_rows
from fedlora.runs.config import build
from tests.fixtures.federation import TINY_VIT

TABLE = {
    "rounds": 1,
    "model": {"name": str(TINY_VIT)},
    "task": {"name": "image-classification", "data": "digits", "train_rows": 60, "test_rows": 20},
    "clients": {"count": 3},
    "adapter": {"name": "lora", "rank": 4},
    "training": {"local_steps": 1, "batch_size": 4, "learning_rate": 1e30},
}


@pytest.mark.parametrize("method", ["fedit", "svd", "flora-na", "ravan"])
def test_one_step_is_enough(method):
    table = {**TABLE, "adapter": {"name": "multihead", "head_rank": 4}} if method == "ravan" else TABLE
    with pytest.raises(FloatingPointError, match="every upload of round 1 was quarantined.*; lower training.learning"):
        fedlora.run(build(for_label(table, method)))


@pytest.mark.parametrize("method", ["fedit", "fedrot-lora", "flexlora"])
def test_weights_that_are_no_longer_finite_leave_no_client(method):
    """The loss of the last step does not know what that step did."""
    table = {**TABLE, "training": {**TABLE["training"], "learning_rate": 1e39}}
    with pytest.raises(FloatingPointError, match="client 0's weights are no longer finite in round 1; lower training"):
        fedlora.run(build(for_label(table, method)))


def test_figures_that_are_no_numbers_are_none():
    """Weights that every check lets in may still overflow in the model."""
    config = build({**TABLE, "training": {"local_steps": 1, "batch_size": 4, "learning_rate": 1e-3}})
    f = config.federation()
    tree = f.model.initial(0)
    spoilt = {
        p: {leaf: x * float("inf") if p in f.heads else x for leaf, x in layer.items()} for p, layer in tree.items()
    }
    with pytest.raises(FloatingPointError, match="the model's outputs for test rows are not numbers"):
        f.evaluator().score_all(spoilt)


def test_products_too_large_to_be_decomposed_are_said():
    def rounds():
        raise torch.linalg.LinAlgError("did not converge")
        yield

    with pytest.raises(FloatingPointError, match="too large to be combined or measured"), explain_overflow():
        list(rounds())


def test_a_comparison_counts_it_and_goes_on(tmp_path):
    own = {"compare": {"svd": {"training": {"learning_rate": 1e-3}}}}
    found = comparison_rows(compare({**TABLE, **own}, ["fedit", "flora-na", "svd"], [0], tmp_path / "out"))
    assert [row["diverged"] for row in found] == [1, 1, 0]
    assert found[0]["global"] is None and found[2]["global"]["mean"] > 0
