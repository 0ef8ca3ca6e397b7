"""Figures made from sums equal scikit-learn's and scipy's on the rows themselves."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef

from fedlora.tasks.metrics.scores import Scores, compute_metrics, is_possible, pool
from fedlora.tasks.text_classification import TextClassification
from fedlora.training.evaluation import summarize

TASK = TextClassification(data="none", metric="f1")


def draw(seed: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, generator=draws), torch.randint(2, (rows,), generator=draws)


@pytest.mark.parametrize("seed", range(4))
def test_the_table_of_two_labels_gives_scikit_learns_figures(seed):
    logits, labels = draw(seed)
    found, predicted = compute_metrics(TASK.scores(logits, labels)), logits.argmax(-1)
    assert found["f1"] == pytest.approx(f1_score(labels, predicted))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted))


@pytest.mark.parametrize("right", [0, 1])
def test_one_label_alone_is_no_error(right):
    logits, labels = torch.tensor([[1.0, 0.0]] * 5), torch.full((5,), right)
    found = compute_metrics(TASK.scores(logits, labels))  # scikit-learn warns, and has 0 as well
    assert found["f1"] == 0.0 and found["matthews"] == 0.0


def test_pooled_rows_are_the_rows_together():
    parts = [draw(seed, 10 + seed) for seed in range(3)]
    together = TASK.scores(*(torch.cat(x) for x in zip(*parts)))
    assert compute_metrics(pool([TASK.scores(*part) for part in parts])) == pytest.approx(compute_metrics(together))


def sums(x: np.ndarray, y: np.ndarray) -> Scores:
    pairs = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return Scores({name: (float(values.sum()), len(x)) for name, values in pairs.items()})


def test_pearson_from_moments_is_scipys():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=50) + 3, draws.normal(size=50)
    y = y + 0.5 * x
    assert compute_metrics(sums(x, y))["pearson"] == pytest.approx(pearsonr(x, y).statistic)
    assert compute_metrics(sums(np.full(7, 0.1), y[:7]))["pearson"] == 0.0


def test_perplexity_is_of_the_mean_over_tokens_and_never_overflows():
    parts = [Scores({"nll": (30.0, 10)}), Scores({"nll": (10.0, 90)})]
    assert compute_metrics(pool(parts))["perplexity"] == pytest.approx(math.exp(0.4))
    assert math.isfinite(compute_metrics(Scores({"nll": (1e9, 1)}))["perplexity"])


def test_the_worst_client_is_the_one_with_the_highest_perplexity():
    scores = {0: Scores({"nll": (1.0, 1)}), 2: Scores({"nll": (2.0, 1)})}
    found = summarize(scores, "perplexity", 3)
    assert found["worst_client"] == 2 and found["worst"] == pytest.approx(math.exp(2))
    assert found["each"] == [pytest.approx(math.e), None, pytest.approx(math.exp(2))]
    assert found["examples_mean"] == pytest.approx(math.exp(1.5)) and found["figures"]["nll"] == 1.5


def test_a_metric_of_two_labels_is_refused_for_three():
    with pytest.raises(ValueError, match="two labels; there are 3: take 'macro_f1'"):
        TASK.network("never loaded", 3, 0)
    with pytest.raises(ValueError, match="two labels; there are 3"):
        TASK.scores(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="task.metric is 'f2'"):
        TextClassification(data="none", metric="f2")


@pytest.mark.parametrize("seed", range(4))
def test_macro_f1_is_scikit_learns(seed):
    draws = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(30, 7, generator=draws), torch.randint(5, (30,), generator=draws)
    logits[:, 6] = -9.0  # neither there nor predicted: counts in no mean
    task = TextClassification(data="none", metric="macro_f1")
    parts = [task.scores(logits[:12], labels[:12]), task.scores(logits[12:], labels[12:])]
    found = compute_metrics(pool(parts))["macro_f1"]
    assert found == pytest.approx(f1_score(labels, logits.argmax(-1), average="macro", zero_division=0))
    assert "macro_f1" not in compute_metrics(TextClassification(data="none").scores(logits, labels))


def test_sums_that_a_party_made_up_are_no_error_and_what_cannot_be_is_known():
    made = Scores({name: (total, 10) for name, total in (("tp", 9), ("fp", 8), ("fn", 0))})
    assert compute_metrics(made)["matthews"] == 0.0, "17 of 10 rows"
    for name, total, fine in (("tp.3", 11, False), ("tp.3", 10, True), ("spearman", -10, True), ("spearman", -11, False),
                              ("accuracy", -1, False), ("mse", 99, True)):  # fmt: skip
        assert is_possible(name, total, 10) == fine
