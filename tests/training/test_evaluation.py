"""Evaluation within budgets of rows and of tokens."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlora.runs.plan.memory import MemoryTracker
from fedlora.schema import ConfigError
from fedlora.tasks._base import Shard
from fedlora.tasks.networks.next_token_loss import AllLogits, ChunkedLogits
from fedlora.training import token_budget
from fedlora.training.evaluation import Evaluation, Evaluator
from fedlora.training.token_budget import default_tokens, total_memory
from tests.fixtures.federation import config
from tests.fixtures.token_rows import TASKS, token_model, token_rows


def evaluator_of(name, **settings):
    task = TASKS[name]
    shards = [Shard(torch.arange(4), torch.tensor(rows)) for rows in ([9, 2, 30, 4], [2, 1, 39])]
    return Evaluator(token_model(task), task, token_rows(task, 40), shards, Evaluation(**settings))


def record_batches(task, monkeypatch):
    """The rows of every batch that is evaluated from now on."""
    batches, evaluate = [], type(task).evaluate

    def recorded(self, network, examples, rows, device):
        batches.append(rows)
        return evaluate(self, network, examples, rows, device)

    monkeypatch.setattr(type(task), "evaluate", recorded)
    return batches


@pytest.mark.parametrize("settings", [{"max_tokens": 1}, {"max_tokens": 90}, {"max_tokens": 90, "batch_size": 2}])
@pytest.mark.parametrize("name", TASKS)
def test_scores_do_not_depend_on_the_budget(name, settings, monkeypatch):
    usual, other = evaluator_of(name), evaluator_of(name, **settings)
    start = usual.model.initial(0)
    expected = [usual.score_client(0, start), usual.score_client(1, start), usual.score_all(start)]
    batches = record_batches(other.task, monkeypatch)
    found = [other.score_client(0, start), other.score_client(1, start), other.score_all(start)]
    for scores, own in zip(expected, found):
        assert scores.sums.keys() == own.sums.keys()
        for metric, values in scores.sums.items():
            assert own.sums[metric] == pytest.approx(values, rel=1e-5)
    rows = torch.cat(batches)
    assert len(rows) == 40 == len(rows.unique()), "every row is evaluated once"
    most = settings.get("batch_size", 256)
    for batch in batches:
        tokens = int(other.task.padded_lengths(other.test, batch).max(0).values.sum()) * len(batch)
        assert len(batch) == 1 or (tokens <= settings["max_tokens"] and len(batch) <= most)


def test_outputs_are_those_of_their_rows():
    few, all_at_once = evaluator_of("causal-lm", max_tokens=60), evaluator_of("causal-lm")
    start, rows = few.model.initial(0), torch.tensor([7, 31, 0, 12])
    torch.testing.assert_close(few._evaluate(start, rows), all_at_once._evaluate(start, torch.arange(40))[rows])


def test_the_budget_decides_the_peak():
    peaks = []
    for settings in ({"max_tokens": 100}, {}):
        evaluator = evaluator_of("causal-lm", **settings)
        start = evaluator.model.initial(0)
        evaluator.model.load(start)
        with MemoryTracker(evaluator.model.network.parameters()) as memory:
            evaluator.score_all(start)
        peaks.append(memory.peak)
    assert peaks[0] < peaks[1] / 3


def test_images_are_evaluated_by_rows():
    f = config("evaluation.batch_size=7").federation()
    batches = f.evaluation.split(f.task, f.data.test, torch.arange(20), f.model)
    assert [len(batch) for batch in batches] == [7, 7, 6]


class Network(nn.Module):
    """A language model of another size: 8 B parameters would not fit into a test."""

    def __init__(self, hidden, words, predicts=True, loss=None):
        super().__init__()
        self.next_token_loss = loss or AllLogits()
        self.config = type("Config", (), {"hidden_size": hidden, "vocab_size": words})()
        self.get_output_embeddings = lambda: nn.Linear(1, 1) if predicts else None


@pytest.mark.parametrize(
    "network,gigabytes,tokens",
    [
        (Network(640, 262_144), 24, 512 * 2),  # 0.94 thousand: the floor
        (Network(640, 262_144), 80, 2048),
        (Network(640, 262_144, loss=ChunkedLogits("model")), 24, 32_768),
        (Network(4096, 128_256), 80, 4096),
        (Network(384, 8000), 24, 16_384),
        (Network(384, 8000, predicts=False), 24, 65_536),
        (Network(16, 40), 24, 131_072),
        (nn.Linear(2, 2), 24, 131_072),
        (Network(4096, 128_256), 4, 1024),
    ],
)
def test_the_default_is_an_eighth_of_the_memory(monkeypatch, network, gigabytes, tokens):
    monkeypatch.setattr(token_budget, "total_memory", lambda device: gigabytes * 2**30)
    assert default_tokens(network, torch.device("cpu")) == tokens


def test_small_networks_have_the_batches_of_256_rows():
    for name in TASKS:
        evaluator = evaluator_of(name)
        rows = torch.arange(40).repeat(10)
        batches = evaluator.settings.split(evaluator.task, evaluator.test, rows, evaluator.model)
        assert [len(batch) for batch in batches] == [256, 144]


def test_memory_of_the_machine_and_of_its_container(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(token_budget, "CONTAINER", tmp_path / "memory.max")
    whole = total_memory(cpu)
    assert whole > 2**28
    for text, bytes_ in (("max\n", whole), ("1000000\n", 1_000_000), (f"{10 * whole}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert total_memory(cpu) == bytes_


def test_budgets_of_less_than_a_token_or_of_rows_without_tokens():
    for section in ("training", "evaluation"):
        with pytest.raises(ConfigError, match=rf"{section}.max_tokens is 0; it must be at least 1"):
            config(f"{section}.max_tokens=0")
        with pytest.raises(ConfigError, match=f"{section}.max_tokens is 64, but rows of 'image-classification' have no tokens; leave it out, and set {section}.batch_size"):  # fmt: skip
            config(f"{section}.max_tokens=64")


def test_machines_may_differ_in_their_budgets():
    from fedlora.runs.build import fingerprint

    table = config().table
    other = {**table, "training": {**table["training"], "max_tokens": 64}, "evaluation": {"max_tokens": 64}}
    assert fingerprint(other) == fingerprint({**table, "evaluation": {}})
    assert replace(Evaluation(), max_tokens=64) != Evaluation()
