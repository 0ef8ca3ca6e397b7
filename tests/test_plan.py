"""A plan against what a run then measures: bytes to the last one, memory within a fifth."""

import json
import subprocess
import sys

import pytest

from fedlora import methods
from fedlora.comparison import for_label
from fedlora.config import ConfigError, build
from fedlora.planning import byte_plan, outline, planned
from fedlora.runs import run

TABLE = {
    "rounds": 3,
    "model": {"name": "demo-vit"},
    "task": {"name": "image-classification", "data": "digits", "train_rows": 90, "test_rows": 30},
    "clients": {"count": 5, "per_round": 2},
    "adapter": {"name": "lora", "rank": 4},
    "training": {"local_steps": 1, "batch_size": 4},
    "evaluation": {"every": 3, "measure": False},
}
ANY_RANK = [name for name in methods.names() if methods.load(name).any_rank]


def agree(table, label=None):
    """The plan's bytes and the run's; returns both plan and run."""
    config = build(for_label(table, label) if label else table)
    found, result = byte_plan(outline(config)), run(config)
    assert found["exact"]
    assert found["run"] == result.summary["bytes"]
    return found, result


@pytest.mark.parametrize("name", methods.names())
def test_bytes_are_those_of_the_run(name):
    plan, result = agree(TABLE, name)
    for direction in ("up", "down"):
        sums = plan["client"][direction]
        first = result.records[0]["bytes"][direction]
        assert sums["first_round"]["mean"] == sum(first.values()) / 2
        later = sum(sum(r["bytes"][direction].values()) for r in result.records[1:])
        assert sums["later_rounds"]["mean"] == pytest.approx(later / 4)


@pytest.mark.parametrize("name", ANY_RANK)
def test_bytes_of_unequal_clients(name):
    clients = {"count": 5, "per_round": 3, "ranks": [1, 2, 4]}
    agree({**TABLE, "clients": clients}, name)


@pytest.mark.parametrize(
    "other",
    [
        {"method": {"name": "fedex-lora", "residual_rank": 3}, "rounds": 6},
        {"method": {"name": "svd", "fold_rest": True}, "clients": {"count": 6, "per_round": 1}, "rounds": 9},
        {"adapter": {"name": "vera", "rank": 8}},
        {"model": {"name": "demo-vit", "targets": ["q_proj", "fc1"], "head": []}, "method": {"name": "flora"}},
        {"server": {"optimizer": "adam"}},
        {"training": {"local_epochs": 1, "batch_size": 8, "precision": "bf16"}},
    ],
    ids=["residual", "absent for long", "vera", "other targets", "server optimiser", "epochs in bf16"],
)
def test_bytes_of_other_settings(other):
    agree({**TABLE, **other})


def test_bytes_that_depend_on_training_are_the_most():
    method = {"name": "hetlora", "decay": 0.5, "tail_penalty": 50.0}
    training = {"local_steps": 5, "batch_size": 8, "learning_rate": 0.05}
    table = {**TABLE, "method": method, "training": training, "clients": {"count": 2}, "rounds": 4}
    plan = planned(table)[0]
    assert not plan["bytes"]["exact"] and any("depend on what training finds" in said for said in plan["estimates"])
    spent = run(build(table)).summary["bytes"]
    assert sum(spent["up"].values()) < sum(plan["bytes"]["run"]["up"].values()), "the clients have pruned themselves"


def test_rows_numbers_and_steps_are_those_of_the_run():
    table = {**TABLE, "training": {"local_epochs": 2, "batch_size": 4}}
    plan = planned(table)[0]
    f = build(table).federation()
    assert plan["rows"]["train"] == [len(s.train) for s in f.shards]
    assert plan["rows"]["test"] == [len(s.test) for s in f.shards]
    assert plan["rows"]["steps"] == [f.training.steps(len(s.train)) for s in f.shards]
    assert plan["rows"]["passes"] == pytest.approx(2 * 3 * 2 / 5, rel=0.15)
    trainable = sum(f.model.parts[p].leaves[leaf].numel() if f.model.parts[p].leaves else f.model.initial(0)[p][leaf].numel()
                    for p, part in f.model.parts.items() for leaf in part.adapter.trainable)  # fmt: skip
    frozen = sum(
        x.numel() for n, x in f.model.network.named_parameters() if "leaves" not in n and "classifier" not in n
    )
    assert (plan["numbers"]["trainable"], plan["numbers"]["frozen"]) == (trainable, frozen)
