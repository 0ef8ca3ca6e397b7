"""Regression: figures against scipy and scikit-learn, strata, export, and the same bits on Flower's grid."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error
from transformers import AutoModelForSequenceClassification

import fedlora
from fedlora.export.peft import export_model
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.tasks.metrics.scores import compute_metrics, pool
from fedlora.tasks.text_regression import TextRegression, quantile_bins

TASK = TextRegression("none")
PAIRS = ("plane", "dog", "river", "guitar", "market", "snow")


def rows(count, shift=0):
    """Like STS-B: two sentences and how near they are, from 0 to 5."""
    for i in range(count):
        near = (i * 7 + shift) % 11 / 2
        one, other = PAIRS[i % 6], PAIRS[i % 6 if near > 2.5 else (i + 3) % 6]
        yield {"sentence1": f"a {one} number {i}", "sentence2": f"the {other} number {i}", "label": near}


def write(folder, split, some):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


@pytest.fixture
def places(shared, tmp_path):
    write(tmp_path, "train", rows(60))
    write(tmp_path, "validation", rows(30, 1))
    return str(shared / "models" / "minilm-l3-h384-v8k"), str(tmp_path)


def config(places, method="fedit", **more):
    model, data = places
    return build(
        {
            "rounds": 2,
            "model": {"name": model},
            "task": {"name": "glue", "subset": "stsb", "data": data, "max_length": 24},
            "clients": {"count": 3, "partition": {"name": "dirichlet", "alpha": 1.0}},
            "adapter": {"name": "lora", "rank": 2, "alpha": 4},
            "method": {"name": method},
            "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 5e-3, "precision": "float32"},
            **more,
        }
    )


numbers = st.integers(-20, 20).map(lambda v: v / 4)  # so that there are ties


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=30))
def test_the_figures_are_scipys(pairs):
    x, y = (numpy.array(side) for side in zip(*pairs))
    found = compute_metrics(
        TASK.scores(torch.tensor(x, dtype=torch.float32)[:, None], torch.tensor(y, dtype=torch.float32))
    )
    assert found["mse"] == pytest.approx(mean_squared_error(y, x))
    constant = len(set(x)) == 1 or len(set(y)) == 1
    assert found["pearson"] == pytest.approx(0.0 if constant else pearsonr(x, y).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(0.0 if constant else spearmanr(x, y).statistic, abs=1e-9)


def test_over_several_clients_pearson_is_exact_and_spearman_the_mean_by_rows():
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 1, generator=draws), torch.randn(50, generator=draws)
    parts = [(x[:20], y[:20]), (x[20:], y[20:])]
    found = compute_metrics(pool(TASK.scores(*part) for part in parts))
    together = compute_metrics(TASK.scores(x, y))
    assert found["pearson"] == pytest.approx(together["pearson"]) and found["mse"] == pytest.approx(together["mse"])
    own = [spearmanr(a[:, 0], b).statistic for a, b in parts]
    assert found["spearman"] == pytest.approx((20 * own[0] + 30 * own[1]) / 50)


def test_a_single_row_has_no_correlation_and_is_no_error():
    found = compute_metrics(TASK.scores(torch.tensor([[1.0]]), torch.tensor([2.0])))
    assert found == {"pearson": 0.0, "spearman": 0.0, "mse": 1.0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 12))
def test_bins_are_of_like_size_and_equal_numbers_share_one(values, bins):
    known = torch.tensor(values, dtype=torch.float32)
    found = quantile_bins(known, known, bins)
    assert found.dtype == torch.int64 and int(found.min()) >= 0 and int(found.max()) < bins
    order = known.argsort(stable=True)
    assert bool((found[order].diff() >= 0).all()), "bins are in the order of the numbers"
    for value in set(values):
        assert len(found[known == value].unique()) == 1
    if len(set(values)) == len(values) >= bins:
        sizes = torch.bincount(found, minlength=bins)
        assert int(sizes.max() - sizes.min()) <= 1


@pytest.mark.shared
def test_splits_by_label_go_by_the_numbers(places):
    federation = config(
        places, clients={"count": 10, "partition": {"name": "pathological", "labels_per_client": 2}}
    ).federation()
    train = federation.data.train
    assert train.labels.dtype == torch.float32 and train.strata.dtype == torch.int64
    assert len(train.strata.unique()) == 10
    for shard in federation.shards:
        assert len(train.strata[shard.train].unique()) == 2
    assert federation.model.network.classifier.out_features == 1


@pytest.mark.shared
def test_it_has_a_name_of_its_own(places):
    task = {"name": "text-regression", "data": places[1], "test_split": "validation", "metric": "mse", "bins": 3}
    result = fedlora.run(config(places, task=task))
    assert result.summary["metric"] == {"name": "mse", "higher": False}
    clients = result.summary["final"]["clients"]
    assert clients["worst"] == max(clients["each"])


@pytest.mark.shared
def test_the_loss_is_the_squared_error_in_float32(places):
    federation = config(places).federation()
    batch = federation.task.collate(federation.data.train, torch.arange(4))
    federation.model.load(federation.model.initial(0))
    network = federation.model.network.eval()
    with torch.no_grad():
        loss, outputs = (of(network, batch) for of in (federation.task.loss, federation.task.outputs))
        with torch.autocast("cpu", torch.bfloat16):
            half = federation.task.loss(network, batch)
    assert outputs.shape == (4, 1) and half.dtype == torch.float32
    assert float(loss) == pytest.approx(mean_squared_error(batch["labels"], outputs[:, 0]), rel=1e-5)


@pytest.mark.shared
def test_it_learns(places):
    """One word tells the number: the correlation rises."""
    for split, count in (("train", 60), ("validation", 30)):
        both = ((i % 6, f"a {PAIRS[i % 6]} number {i}") for i in range(count))
        write(Path(places[1]), split, ({"sentence1": text, "sentence2": text, "label": 1.0 * n} for n, text in both))
    training = {"local_steps": 25, "batch_size": 16, "learning_rate": 5e-3, "precision": "float32"}
    result = fedlora.run(config(places, training=training, clients={"count": 1}, rounds=1))
    assert result.summary["final"]["global"]["pearson"] > 0.5
    assert result.summary["final"]["global"]["spearman"] > 0.5


@pytest.mark.shared
@pytest.mark.parametrize("merged", [False, True])
def test_an_export_has_one_output(places, tmp_path, merged):
    fedlora.run(config(places), tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    assert export_model(run, tmp_path / "out", merged=merged)["difference"] < 1e-4
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| pearson, global test rows |" in text
    if merged:
        network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    else:
        assert "id2label=id2label" in text
        assert json.loads((tmp_path / "out" / "labels.json").read_text())["id2label"] == {"0": "score"}
        base = AutoModelForSequenceClassification.from_pretrained(places[0], num_labels=1)
        network = PeftModel.from_pretrained(base, tmp_path / "out")
    batch = run.config.task.probe(run.network())
    assert network.eval()(**batch).logits.shape == (4, 1)


@pytest.mark.shared
@pytest.mark.parametrize("method", ["fedit", "fedsa-lora"])
def test_flowers_grid_has_the_bits_of_one_process(places, tmp_path, method, monkeypatch):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fixtures import flower

    monkeypatch.setattr(flower, "config", lambda: config(places, method))
    here, world = fedlora.run(config(places, method)), flower.World(tmp_path / "nodes")
    there = world.run()
    assert flower.same(there[-1].shared, here.shared)
    # Predictions of this cut model hardly differ from row to row, so Pearson's magnifies their last digits; nothing else.
    assert flower.records_agree(there, here.records, within=2e-3)
    steady = ("mse", "spearman")
    theirs, ours = [
        [[r["clients"]["figures"][name] for name in steady] + [r.get("global")] for r in map(flower.plain, side)]
        for side in ([r.record for r in there], here.records)
    ]
    assert flower.agree(theirs, ours)


@pytest.mark.parametrize("told", [{"spearman.sum": 31.0}, {"spearman.sum": -31.0}, {"xy.sum": float("nan")}])
def test_impossible_sums_are_refused_and_strange_ones_harm_nobody(told):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from fedlora.flower import replies as checks

    draws = torch.Generator().manual_seed(0)
    sums = TASK.scores(torch.randn(30, 1, generator=draws), torch.randn(30, generator=draws)).sums
    said = {**{f"{k}.sum": v[0] for k, v in sums.items()}, **{f"{k}.count": v[1] for k, v in sums.items()}}
    assert checks.read_scores(said, "pearson").sums == sums
    with pytest.raises(checks.RefusedError):
        checks.read_scores({**said, **told}, "pearson")
    for name in ("x", "xx", "xy"):
        for value in (1e300, -1e300, 0.0):
            compute_metrics(checks.read_scores({**said, f"{name}.sum": value}, "pearson"))


BAD = {
    "text": ([{"text": "a", "label": "near"}], r"holds 'near' in the training rows; a regression needs a number"),
    "truth": ([{"text": "a", "label": True}], r"holds True in the training rows"),
    "gap": ([{"text": "a", "label": 1.0}, {"text": "b", "label": None}], r"has 1 missing values in 10 rows"),
    "no column": ([{"text": "a", "score": 1.0}], r"no column 'label'"),
}


@pytest.mark.shared
@pytest.mark.parametrize("some,sentence", BAD.values(), ids=BAD)
def test_mistakes(tmp_path, places, some, sentence):
    odd = [*some, *({**some[0]} for _ in range(10 - len(some)))]
    write(tmp_path, "train", odd)
    with pytest.raises(ValueError, match=sentence) as caught:
        TextRegression(str(tmp_path), test_split="train").load(places[0], 0)
    assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_numbers_cannot_be_called_by_other_names(places):
    with pytest.raises(ValueError, match=r"permute_labels is set, but the rows of this task have no labels"):
        config(places, clients={"count": 2, "permute_labels": True}).federation()
    with pytest.raises(ValueError, match="task.bins is 0"):
        TextRegression("x", bins=0)
