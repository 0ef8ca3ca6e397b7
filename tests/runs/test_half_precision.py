"""Runs on a checkpoint in bfloat16 or float16: loading, notes, export, chat and plan; and the choice of attention."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import fedlora
from fedlora.export.peft import export_model
from fedlora.runs.build import attach_adapters
from fedlora.runs.chat import Chat
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.runs.plan.plan import plan_run
from fedlora.schema import ConfigError, apply_overrides
from fedlora.tasks.networks.generation import GenerationSettings
from fedlora.tasks.networks.pretrained import load_with_new_head, stored_dtype
from fedlora.training import device as devices
from tests.fixtures.federation import same
from tests.fixtures.networks import write_decoder


@pytest.fixture(autouse=True)
def has_bf16(monkeypatch):
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)


@pytest.fixture
def config(tmp_path):
    """``config(dtype, *overrides)``: of a language model that is stored in a dtype."""

    def make(dtype, *overrides):
        folder = tmp_path / str(dtype)
        if not folder.exists():
            write_decoder(folder)
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
        rows = [{"prompt": f"{i} and {i}", "response": f" is {2 * i}"} for i in range(12)]
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = {
            "rounds": 2,
            "model": {"name": str(folder)},
            "task": {"name": "causal-lm", "data": str(tmp_path), "max_length": 32},
            "clients": {"count": 2},
            "adapter": {"name": "lora", "rank": 2, "alpha": 4},
            "training": {"local_steps": 6, "learning_rate": 2e-2, "batch_size": 4},
        }
        return build(apply_overrides(table, list(overrides)))

    return make


def dtypes(path):
    return {x.dtype for x in load_file(path).values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_its_exports_and_its_chat(config, tmp_path, dtype):
    settings = config(dtype, "method.name=flora")
    model = settings.federation().model
    assert {x.dtype for x in model.network.parameters()} == {torch.bfloat16} and model.precision == "bf16"
    result = fedlora.run(settings, tmp_path / "run")
    assert result.summary["base"] == {"precision": "bf16", "attention": "sdpa"}
    is_rounded = any("in float16: it is held in bfloat16" in note for note in result.summary.get("notes", ()))
    assert is_rounded == (dtype == torch.float16)
    found = [record["global"]["perplexity"] for record in result.records]
    assert found[-1] < found[0]

    run = RunFolder.open(tmp_path / "run")
    assert export_model(run, tmp_path / "adapter")["difference"] < 0.03
    assert export_model(run, tmp_path / "merged", merged=True)["difference"] < 0.03
    assert dtypes(tmp_path / "merged" / "model.safetensors") == {dtype} and stored_dtype(tmp_path / "merged") == dtype
    served = attach_adapters(run.config, run.network("float32"))
    served.load(run.tree(None))
    served.fold({part: (f,) for part, f in run.base_updates.items()})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    path, part = next(iter(served.parts.items()))
    weight = part.base.weight + part.adapter.delta(run.tree(None)[path]).dense()
    assert torch.equal(merged.get_submodule(path).weight, weight.to(dtype).float()), "merged in float32, rounded once"

    talk = Chat.open(run)
    assert next(talk.model.network.parameters()).dtype == torch.bfloat16
    assert isinstance(talk.say("1 and 1", GenerationSettings(4)), str)


def test_without_hardware_it_is_float32_to_the_bit_and_said(config, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    slow = fedlora.run(config(torch.bfloat16), tmp_path / "slow")
    assert slow.summary["base"]["precision"] == "float32"
    assert any("held in float32, in twice the memory" in note for note in slow.summary["notes"])
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    asked = fedlora.run(config(torch.bfloat16, "training.precision=float32"), tmp_path / "asked")
    assert same(asked.shared, slow.shared) and "notes" not in asked.summary
    export_model(RunFolder.open(tmp_path / "asked"), tmp_path / "merged", merged=True)
    assert dtypes(tmp_path / "merged" / "model.safetensors") == {torch.float32}


@pytest.mark.parametrize("dtype, bytes_each", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_plan_counts_the_weights_as_they_are_loaded(config, dtype, bytes_each):
    settings = config(dtype, "method.name=flora", "rounds=40")
    plan = plan_run(settings)
    numbers = sum(x.numel() for x in LlamaForCausalLM.from_pretrained(settings.model.name).parameters())
    assert numbers * bytes_each == pytest.approx(plan["memory"]["weights"], rel=0.01)
    memory, is_half = plan["memory"], dtype == torch.bfloat16
    assert any("at most" in text for text in plan["estimates"]) == is_half
    if is_half:  # two weights of 32 x 32 at up to 32 ranks; four ranks a round
        assert (memory["base_updates_a_round"], memory["base_updates_at_most"]) == (2048, 2 * 32 * 64 * 4)
        assert memory["base_updates"] == memory["base_updates_at_most"]


def test_what_is_kept_beside_the_base_is_what_the_plan_says(config, tmp_path):
    settings = config(torch.bfloat16, "method.name=flora", "rounds=3")
    model = settings.federation().model
    fedlora.run(settings, tmp_path / "run")
    model.fold({part: (f,) for part, f in RunFolder.open(tmp_path / "run").base_updates.items()})
    held = sum(x.nbytes for part in model.parts.values() if part.overlay for x in part.overlay)
    assert held == plan_run(settings)["memory"]["base_updates"]


@pytest.mark.parametrize("checkpoint", ["of other weights", "of another size"])
def test_a_new_head_is_drawn_as_on_a_float32_base(tmp_path, checkpoint):
    from transformers import AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    kind = BertForMaskedLM if checkpoint == "of other weights" else BertForSequenceClassification
    kind(BertConfig(vocab_size=40, **sizes)).bfloat16().save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification
    exact = load_with_new_head(auto, str(tmp_path), 5, 3)
    half = load_with_new_head(auto, str(tmp_path), 5, 3, {"dtype": torch.bfloat16})
    assert half.classifier.weight.dtype == torch.float32 and half.bert.embeddings.word_embeddings.weight.dtype != (
        torch.float32
    )
    pairs = zip(exact.named_parameters(), half.named_parameters(), strict=True)
    assert all(name == other and torch.equal(x, y.float()) for (name, x), (other, y) in pairs)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_is_chosen_and_recorded(config, kind):
    result = fedlora.run(config(torch.float32, f"model.attention={kind}", "rounds=1"))
    assert result.summary["base"] == {"precision": "float32", "attention": kind}


def test_attention_that_cannot_be_had(config, monkeypatch):
    with pytest.raises(ValueError, match="model.attention is 'flash_attention_2', which needs a CUDA device"):
        config(torch.bfloat16, "model.attention=flash_attention_2").federation()
    from fedlora.tasks.networks.pretrained import attention_options

    with pytest.raises(ValueError, match="needs the package flash-attn"):
        attention_options("flash_attention_2", torch.device("cuda"))
    with pytest.raises(ConfigError, match="takes no mask that separates the rows of task.packing"):
        config(torch.bfloat16, "model.attention=flash_attention_2", "task.packing=true")
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(ValueError, match="model.attention is 'sdpa', which the model .* cannot compute"):
        config(torch.float32, "model.attention=sdpa").federation()


def test_rounding_a_quantised_base_is_refused(config):
    with pytest.raises(ConfigError, match="model.overlay is false, but a base of model.quantize"):
        config(torch.bfloat16, "model.quantize='4bit'", "model.overlay=false")


MEASURE = """
import sys, torch
from transformers import AutoModelForCausalLM
from fedlora.adapters import LoRA
from fedlora.tasks.networks.pretrained import load_complete
from fedlora.training.model import Model

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def load(folder, precision):
    network = load_complete(AutoModelForCausalLM, folder, {"dtype": torch.bfloat16} if precision == "bf16" else None)
    Model.attach(network, LoRA(2), precision="bf16")
    for x in network.parameters():
        x.view(torch.int16).max() if x.numel() else 0  # read every weight, because files are mapped into memory
    return network

load(sys.argv[1], "bf16")  # libraries are loaded on first use
before = status("VmRSS")
network = load(sys.argv[2], sys.argv[3])
print((status("VmHWM") - before) / sum(x.nbytes for x in network.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("precision, least, most", [("bf16", 0.9, 1.1), ("float32", 2.0, 4.0)])
def test_loading_takes_the_weights_and_a_tenth(tmp_path, precision, least, most):
    sizes = {"num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 8000}
    for name, width in (("small", 64), ("large", 1024)):
        with torch.device("meta"):
            network = LlamaForCausalLM(LlamaConfig(hidden_size=width, intermediate_size=2 * width, **sizes))
        network.bfloat16().to_empty(device="cpu")
        for x in network.parameters():
            x.data.zero_()
        network.save_pretrained(tmp_path / name, max_shard_size="30MB")
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 2
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), precision]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert least < float(found.stdout) < most
