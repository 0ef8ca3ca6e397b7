"""DPO: the loss and its gradient against TRL's trainer, the reference of methods that fold, and whole runs."""

import json

import pytest
import torch

import fedlora
from fedlora.runs.config import build
from fedlora.runs.plan.plan import plan_run
from fedlora.schema import ConfigError
from tests.fixtures.networks import write_decoder

ROWS = [
    {"prompt": f"Say {word}. ", "chosen": f"{word}!", "rejected": f"No {word * (1 + k % 3)}", "kind": "ab"[k % 2]}
    for k, word in enumerate(["sun", "moon", "a star", "sky", "rain", "the sea"] * 3)
]
METHODS = {"fedit": {}, "flora": {}, "fedex-lora": {}, "fedsa-lora": {}, "ravan": {"name": "multihead", "heads": 2, "head_rank": 2}, "feddpa": {"name": "dual-lora", "rank": 2}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("dpo")
    write_decoder(place / "model")
    for split, rows in (("train", ROWS), ("test", ROWS[:6])):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def config(folder, method="fedit", task=(), **tables):
    table = {
        "rounds": 2, "model": {"name": str(folder / "model")},
        "task": {"name": "causal-lm-dpo", "data": str(folder), "beta": 0.5, **dict(task)},
        "clients": {"count": 2, "partition": {"name": "iid"}}, "method": {"name": method},
        "adapter": METHODS[method] or {"name": "lora", "rank": 2, "alpha": 8},
        "training": {"local_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
    }  # fmt: skip
    return build({**table, **tables})


def test_loss_and_gradient_are_those_of_trl(folder, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    f = config(folder).federation()
    tree = f.model.initial(0)
    draws = torch.Generator().manual_seed(1)
    tree = {p: {**x, "B": torch.randn(x["B"].shape, generator=draws) * 0.3} for p, x in tree.items()}
    f.model.load(tree)
    batch = f.task.collate(f.data.train, torch.arange(6))
    gradient, loss = f.model.gradient(lambda net: f.task.loss(net, batch)), f.task.loss(f.model.network, batch)
    args = trl.DPOConfig(output_dir=str(tmp_path), beta=0.5, report_to=[], use_cpu=True, bf16=False, activation_checkpointing=False, max_length=1024)  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rows = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS[:6]])
    trainer = trl.DPOTrainer(
        network, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    theirs = {name: x for name, x in trainer.model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for path, layer in tree.items():
            for leaf, x in layer.items():
                (own,) = (y for name, y in theirs.items() if f"{path}.lora_{leaf}." in name)
                own.copy_(x)
    trainer.model.eval()
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    expected.backward()
    expected, loss = expected.detach(), loss.detach()
    assert abs(float(expected) - 0.6931) > 0.01, "the adapter has an effect"
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    for path, layer in gradient.items():
        for leaf, x in layer.items():
            (own,) = (y.grad for name, y in theirs.items() if f"{path}.lora_{leaf}." in name)
            torch.testing.assert_close(x, own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_pretrained_model_with_every_method(folder, tmp_path, method):
    from transformers import AutoModelForCausalLM

    result = fedlora.run(config(folder, method), tmp_path / "run")
    sums = result.summary["final"]["clients"]["figures"]
    assert sums.keys() >= {"reward_accuracy", "reward_margin", "dpo_loss"}
    assert sums["dpo_loss"] < 0.69 and sums["reward_margin"] > 0, "it learns its few rows"
    again = config(folder, method).federation()  # as a resumed run builds it
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    batch = again.task.collate(again.data.train, torch.arange(4))
    for column, part in enumerate(again.task.forward_batches(batch)):
        logs = base(part["input_ids"], attention_mask=part["attention_mask"]).logits[:, :-1].log_softmax(-1)
        labels = part["labels"][:, 1:]
        values = logs.gather(2, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels < 0, 0).sum(1)
        torch.testing.assert_close(batch["reference"][:, column].float(), values, atol=1e-4, rtol=0)


def test_a_row_without_a_reference_stops_training(folder):
    f = config(folder).federation()
    batch = f.task.collate(f.task.load(str(folder / "model"), 0).train, torch.arange(2))
    f.model.load(f.model.initial(0))
    assert f.task.loss(f.model.network, batch).isnan()


def test_example_privacy(folder):
    pytest.importorskip("opacus")
    f = config(folder, privacy={"level": "example", "noise_multiplier": 1.0, "clip": 1.0, "delta": 1e-3}).federation()
    from fedlora.security.privacy.per_sample_gradients import compute_gradients

    f.model.load(f.model.initial(0))
    leaves = f.model.select({path: part.adapter.trainable for path, part in f.model.parts.items()})
    rows = torch.arange(3)
    batch = f.task.collate(f.data.train, rows)
    _, grads = compute_gradients(f.model, lambda net: f.task.losses(net, batch), 3, leaves)
    for i in range(3):
        one = f.task.collate(f.data.train, rows[i : i + 1])
        alone = f.model.gradient(lambda net, one=one: f.task.loss(net, one))
        for (path, leaf), x in grads.items():
            torch.testing.assert_close(x[i], alone[path][leaf], atol=1e-5, rtol=1e-3)


def test_plan_counts_both_answers(folder):
    table = config(folder).table
    own = {"name": "causal-lm", "data": str(folder), "prompt": "{prompt}", "response": "{chosen}"}
    both, one = (plan_run(build({**table, "task": task}))["flops"] for task in (table["task"], own))
    assert 1.8 < both["training"] / one["training"] < 3, "the rejected answers are a little longer"


def test_refusals(folder, tmp_path):
    for wrong, sentence in (
        ({"beta": 0.0}, "task.beta is 0.0"), ({"packing": True}, "packing"), ({"metric": "accuracy"}, "reward_margin"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=sentence):
            config(folder, task=wrong)
    for row, sentence in (
        ({"prompt": "a", "chosen": "same", "rejected": "same"}, "are the same in 4 of 4 training rows"),
        ({"chosen": "ab", "rejected": "ac"}, "has no column 'prompt'"),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}, "has chat messages"),
    ):
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 4)
        with pytest.raises(ValueError, match=sentence):
            config(folder, task={"data": str(tmp_path)}).federation()
