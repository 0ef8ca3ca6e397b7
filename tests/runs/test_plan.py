"""A plan against what a run then measures: bytes to the last one, memory within a fifth."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedlora.api import run
from fedlora.cli import app
from fedlora.engines.client_turn import ClientTurn
from fedlora.methods import METHODS
from fedlora.reporting.tables import plan as plans
from fedlora.reporting.terminal import show
from fedlora.rounds import client_turn
from fedlora.runs.compare import for_label
from fedlora.runs.config import build
from fedlora.runs.plan.memory import MemoryTracker
from fedlora.runs.plan.plan import build_meta_model, find_problems, plan_bytes, plan_methods
from fedlora.schema import ConfigError, dumps
from tests.fixtures.federation import TINY_VIT
from tests.fixtures.networks import write_encoder

TABLE = {
    "rounds": 3,
    "model": {"name": str(TINY_VIT)},
    "task": {"name": "image-classification", "data": "digits", "train_rows": 90, "test_rows": 30},
    "clients": {"count": 5, "per_round": 2},
    "adapter": {"name": "lora", "rank": 4},
    "training": {"local_steps": 1, "batch_size": 4},
    "evaluation": {"every": 3, "measure": False},
}
ANY_RANK = [name for name in METHODS.names() if METHODS.load(name).any_rank]


def wide(table, label):
    """The table for this method: Ravan's heads need more room side by side than the tiny ViT's weights have."""
    return {**table, "model": {"name": "demo-vit"}} if label == "ravan" else table


def agree(table, label=None):
    """The plan's bytes and the run's; returns both plan and run."""
    table = wide(table, label)
    config = build(for_label(table, label) if label else table)
    found, result = plan_bytes(build_meta_model(config)), run(config)
    assert found["exact"]
    assert found["run"] == result.summary["bytes"]
    return found, result


@pytest.mark.parametrize("name", METHODS.names())
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


@pytest.mark.parametrize("name", ["flora", "ravan"])
def test_bytes_and_steps_of_clients_that_drop_out_are_slow_or_new(name):
    clients = {
        "count": 7, "new": 2, "per_round": 4, "capability": "uniform", "capability_scales": ["rank", "steps"],
        "dropout": 0.3, "stragglers": 0.5,
    }  # fmt: skip
    table = {**TABLE, "clients": clients, "training": {"local_steps": 4, "batch_size": 4}}
    agree(table, name)
    f = build(for_label(wide(table, name), name)).federation()
    rows = plan_methods(wide(table, name), [name])[0]["rows"]
    assert (rows["clients"], len(rows["train"])) == (5, 5)
    assert rows["steps"] == [f.training_of(0, k).steps(len(f.shards[k].train)) for k in range(5)]
    assert len(set(rows["steps"])) > 1


@pytest.mark.parametrize(
    "other",
    [
        {"method": {"name": "fedex-lora", "residual_rank": 3}, "rounds": 6},
        {"method": {"name": "svd", "fold_rest": True}, "clients": {"count": 5, "per_round": 1}, "rounds": 7},
        {"adapter": {"name": "vera", "rank": 8}},
        {"model": {**TABLE["model"], "targets": ["q_proj", "fc1"], "head": []}, "method": {"name": "flora"}},
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
    plan = plan_methods(table)[0]
    assert not plan["bytes"]["exact"] and any(
        "depend on the values that training finds" in said for said in plan["estimates"]
    )
    spent = run(build(table)).summary["bytes"]
    assert sum(spent["up"].values()) < sum(plan["bytes"]["run"]["up"].values()), "the clients have pruned themselves"


def test_rows_numbers_and_steps_are_those_of_the_run():
    table = {**TABLE, "training": {"local_epochs": 2, "batch_size": 4}}
    plan = plan_methods(table)[0]
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


MEASURE = """
import ctypes, gc, json, sys
from fedlora.runs.config import build
from fedlora.api import run

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

config = build(json.loads(sys.argv[1]))
run(config)  # libraries and kernels are loaded on first use
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
run(config)
print(status("VmHWM") - before)
"""


@pytest.mark.shared
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's peak cannot be set back here")
@pytest.mark.parametrize(
    "model,batch,scored,precision",
    [
        pytest.param("minilm-l3-h384-v8k", 48, 64, "bf16", marks=pytest.mark.slow),
        pytest.param("minilm-l3-h384-v8k", 8, 256, "float32", marks=pytest.mark.slow),
        ("stories260k-llama", 64, 16, "float32"),
    ],
    ids=["training", "evaluation", "llama"],
)
def test_memory_is_within_a_fifth(shared, model, batch, scored, precision):
    table = {
        "rounds": 1,
        "model": {"name": str(shared / "models" / model)},
        "task": {"name": "text-classification", "data": str(shared / "data" / "banking77"), "train_rows": 300,
                 "test_rows": 200},
        "clients": {"count": 2},
        "training": {"local_steps": 2, "batch_size": batch, "precision": precision},
        "evaluation": {"batch_size": scored},
        "engine": {"threads": 1, "allocator": "return"},
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(table)], capture_output=True, text=True, check=True, env=environment
    )
    spent = int(found.stdout)
    said = plan_methods(table)[0]["memory"]["one_process"]
    assert said == pytest.approx(spent, rel=0.2)


@pytest.mark.parametrize("budget", [None, 100])
def test_peaks_are_those_of_the_parts_of_a_batch(tmp_path, budget):
    """Against the tensors of real training and evaluation, with one row that is longer than all others."""
    write_encoder(tmp_path / "encoder")
    rows = [{"text": "ab " * (3 + 5 * (n % 7) + 40 * (n == 6)), "label": n % 2} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = {} if budget is None else {"max_tokens": budget}
    table = {
        "rounds": 1,
        "model": {"name": str(tmp_path / "encoder")},
        "task": {"name": "text-classification", "data": str(tmp_path / "rows.jsonl"), "max_length": 64},
        "clients": {"count": 2},
        "training": {"local_epochs": 1, "batch_size": 8, "accumulation_steps": 2, **limit},
        "evaluation": limit,
    }  # fmt: skip
    plan, config = plan_methods(table)[0]["memory"], build(table)
    f = config.federation()
    tree = f.model.initial(f.seed)
    f.model.load(tree)
    peaks = []
    for client in (0, 1):
        trainer = ClientTurn(f, f.turn(0, client)).build_trainer()
        with MemoryTracker([*f.model.network.parameters(), *f.model.network.buffers()]) as memory:
            client_turn(f.rules, tree, {}, trainer.turn, trainer)
        peaks.append(memory.peak)
    assert plan["training_peak"] == pytest.approx(max(peaks), rel=0.1)
    with MemoryTracker([*f.model.network.parameters(), *f.model.network.buffers()]) as memory:
        f.evaluator().score_all(tree)
    assert plan["evaluation_peak"] == pytest.approx(memory.peak, rel=0.1)
    if budget is not None:
        whole = plan_methods({**table, "training": {**table["training"], "max_tokens": 10_000}, "evaluation": {}})[0]
        assert plan["training_peak"] < whole["memory"]["training_peak"] / 2
        assert plan["evaluation_peak"] < whole["memory"]["evaluation_peak"] / 2


# ------------------------------------------------------------------------------ what a user meets
def test_no_weights_are_needed(tmp_path):
    whole = plan_methods(TABLE)[0]
    shutil.copytree(TINY_VIT, tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    assert plan_methods({**TABLE, "model": {"name": str(tmp_path / "vit")}})[0] == whole


@pytest.mark.shared
def test_a_pooler_that_the_checkpoint_lacks_is_trained(shared, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(shared / "models" / "minilm-l3-h384-v8k", folder)
    table = {
        **TABLE,
        "model": {"name": str(folder)},
        "task": {"name": "text-classification", "data": str(shared / "data" / "banking77"), "train_rows": 200,
                 "test_rows": 200, "max_length": 16},
        "clients": {"count": 2},
        "rounds": 1,
    }  # fmt: skip
    before = build_meta_model(build(table)).federation.heads
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "pooler" not in k}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    after = build_meta_model(build(table)).federation.heads
    assert before == {"classifier"} and after == {"classifier", "bert.pooler.dense"}
    assert after == build(table).federation().heads


@pytest.mark.shared
def test_a_head_that_the_checkpoint_brings_is_not_trained(shared, tmp_path):
    """Tied to the embedding or not: what a language model has on top is part of what was pretrained."""
    from transformers import AutoModelForCausalLM

    there = shared / "models" / "stories260k-llama"
    shutil.copytree(there, tmp_path / "untied")
    network = AutoModelForCausalLM.from_pretrained(there, tie_word_embeddings=False)
    network.save_pretrained(tmp_path / "untied")
    rows = [{"question": f"{n} apples and {n}?", "answer": f"#### {2 * n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "causal-lm", "data": str(tmp_path / "rows.jsonl"), "max_length": 32}
    for model in (there, tmp_path / "untied"):
        table = {**TABLE, "model": {"name": str(model)}, "task": task, "clients": {"count": 2}, "rounds": 2}
        for label in ("fedit", "flora"):
            agree(table, label)
        assert build_meta_model(build(table)).federation.heads == build(table).federation().heads == frozenset()
    asked = {**task, "metric": "exact_match", "max_new_tokens": 4}
    said = " ".join(
        plan_methods({**table, "task": asked, "model": {**table["model"], "quantize": "4bit"}})[0]["estimates"]
    )
    assert "Answers are generated" in said and "model.quantize" in said
    chosen = {**task, "metric": "choice_accuracy", "choices": [f"#### {2 * n}" for n in range(12)]}
    assert "Every choice is scored" in " ".join(plan_methods({**table, "task": chosen})[0]["estimates"])


def test_all_that_is_wrong_is_said_at_once():
    table = {**TABLE, "rounds": 0, "clients": {"count": -1}, "training": {"lr": 1.0}, "evaluation": {"every": 0}}
    found = find_problems(table)
    assert len(found) == 4
    for words in ("rounds is 0", "clients.count is -1", "'training.lr'", "evaluation.every is 0"):
        assert sum(words in sentence for sentence in found) == 1
    assert find_problems(TABLE) == []
    heads = {**TABLE, "adapter": {"name": "multihead"}, "method": {"name": "ravan"}, "rounds": -1}
    assert find_problems(heads) == ["rounds is -1; a run needs at least 1."], "sections are judged with those they need"
    assert "needs one rank" in find_problems({**TABLE, "clients": {"count": 2, "ranks": [1, 2]}})[0]
    both = find_problems({**TABLE, "adapter": {"rank": 0}, "clients": {"count": 0}})
    assert [sentence.split(" is")[0] for sentence in both] == ["clients.count", "adapter.rank"], "none hides another"


def test_a_method_that_cannot_be_run_says_why_in_its_row():
    table = {**TABLE, "clients": {"count": 2, "ranks": [1, 4]}, "rounds": 1}
    fedit, flora = plan_methods(table, ["fedit", "flora"])
    assert "needs one rank for all" in fedit["problem"] and flora["bytes"]["run"]["up"]["adapter"] > 0
    show(*plans.tabulate_plans([fedit, flora]))
    with pytest.raises(ConfigError, match="needs one rank for all"):
        plan_methods(table, ["fedit"])


def test_a_hub_id_that_is_not_here_is_one_sentence():
    with pytest.raises(ConfigError, match="'nobody/nothing' could not be loaded"):
        plan_methods({**TABLE, "model": {"name": "nobody/nothing"}})


def test_parties_with_own_data_are_planned_without_rows():
    task = {**TABLE["task"], "label_names": [str(i) for i in range(10)]}
    own = {**TABLE, "task": task, "clients": {"count": 3, "partition": {"name": "own"}}}
    found = plan_methods(own)[0]
    assert found["rows"]["train"] is None and found["flops"]["training"] > 0
    assert any("No rows are here" in said for said in found["estimates"])
    show(*plans.tabulate_plan(found))


def test_operations_grow_with_what_is_asked():
    once, twice = (
        plan_methods({**TABLE, "training": {"local_steps": n, "batch_size": 4}})[0]["flops"]["training"] for n in (2, 4)
    )
    assert twice == pytest.approx(2 * once)
    small = plan_methods({**TABLE, "adapter": {"name": "lora", "rank": 1}})[0]
    large = plan_methods({**TABLE, "adapter": {"name": "lora", "rank": 16}})[0]
    assert large["memory"]["moments"] > 5 * small["memory"]["moments"]
    assert large["flops"]["training"] > small["flops"]["training"]


def test_the_command_prints_and_refuses(tmp_path, capsys):
    text = dumps(TABLE)
    (tmp_path / "my.toml").write_text(text)
    runner = CliRunner()
    found = runner.invoke(app, ["plan", str(tmp_path / "my.toml"), "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout)[0]["numbers"]["trainable"] == 682
    bad = runner.invoke(app, ["plan", str(tmp_path / "my.toml"), "-o", "rounds=0", "-o", "clients.count=0"])
    assert bad.exit_code == 2 and "rounds is 0" in bad.stderr and "clients.count is 0" in bad.stderr


@pytest.mark.shared
def test_memory_of_a_large_vocabulary_is_that_of_chunks(shared, tmp_path):
    """The logits of a batch would be several chunks of 128 MiB; one chunk and its copies are counted."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaForCausalLM(LlamaConfig(vocab_size=65_536, **small)).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(shared / "models" / "stories260k-llama").save_pretrained(tmp_path / "wide")
    rows = [{"question": "how many apples?" * 4, "answer": "ten apples" * 4} for _ in range(64)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "causal-lm", "data": str(tmp_path / "data"), "max_length": 64}
    training = {"precision": "float32", "batch_size": 32, "local_steps": 1}
    table = {**TABLE, "model": {"name": str(tmp_path / "wide")}, "task": task, "clients": {"count": 1}, "rounds": 1}
    plan = plan_methods({**table, "training": training, "evaluation": {"batch_size": 64}})[0]
    chunk = 4 * 2**25
    assert chunk < plan["memory"]["evaluation_peak"] < 3 * chunk
    assert chunk < plan["memory"]["training_peak"] < 5 * chunk
    assert not any("every position" in text for text in plan["estimates"])
