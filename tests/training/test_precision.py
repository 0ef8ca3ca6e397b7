"""The precision of a base: what is cast, what is not, and what rounding costs."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
)

from fedlora.adapters import LoRA
from fedlora.training import device as devices
from fedlora.training.device import Engine
from fedlora.training.local import Training
from fedlora.training.model import Model
from fedlora.training.precision import cast_parameters
from fedlora.types import Factors

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}


def llama(**more):
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=2048, **more)).eval()
    for layer in network.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            nn.init.normal_(module.weight, std=0.3)  # attention that depends on positions
    return network


def test_rotary_frequencies_stay_in_float32_and_logits_come_closer():
    exact, now, before = llama(), llama(), llama()
    model = Model.attach(now, LoRA(2), precision="bf16")
    model.load(model.initial(0))
    before.to(torch.bfloat16)  # buffers too
    assert now.model.rotary_emb.inv_freq.dtype == torch.float32
    assert now.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    ids = torch.randint(50, (2, 1500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.running():
        new, old = now(ids).logits.float(), before(ids).logits.float()
    with torch.no_grad():
        away, was = ((x - exact(ids).logits).norm() for x in (new, old))
    assert away < 0.5 * was


def test_weights_that_the_network_names_stay_in_float32():
    network = llama()
    network._keep_in_fp32_modules_strict = {"input_layernorm", "layers.*.mlp.gate_proj"}
    network._keep_in_fp32_modules = {"lm_head"}  # of float16 only, as in transformers
    cast_parameters(network, torch.bfloat16)
    kept = {name for name, x in network.named_parameters() if x.dtype == torch.float32}
    assert kept == {
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("input_layernorm", "mlp.gate_proj")
    }


def test_running_statistics_have_the_dtype_of_their_parameters():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    network = AutoModelForImageClassification.from_config(config).eval()
    model = Model.attach(network, LoRA(2), targets=["classifier.1"], head=[], precision="bf16")
    model.load(model.initial(0))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(x.weight.dtype == x.running_mean.dtype == torch.float32 for x in norms)
    with torch.no_grad(), model.running():
        assert network(torch.randn(2, 3, 32, 32)).logits.isfinite().all()


def test_tied_weights_stay_tied():
    network = llama(tie_word_embeddings=True)
    cast_parameters(network, torch.bfloat16)
    assert network.lm_head.weight is network.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 has its weights transposed
def test_an_update_is_added_in_float32_and_rounded_once(family):
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 1, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    network = llama() if family == "llama" else AutoModelForCausalLM.from_config(GPT2Config(**sizes))
    model = Model.attach(network, LoRA(2), head=[], precision="bf16", overlay=False)
    path, part = next(iter(model.parts.items()))
    m, n = part.shape
    before = part.base.weight.clone()
    update = Factors(1e-2 * torch.randn(m, 3), torch.randn(3, n))
    model.fold({path: (update,)})
    dense = update.dense().mT if family == "gpt2" else update.dense()
    assert torch.equal(part.base.weight, (before.float() + dense).bfloat16()) and part.overlay is None
    model.unfold()
    assert torch.equal(part.base.weight, before)


@pytest.mark.parametrize("ratio, least, most", [(0.1, 0.01, 0.03), (0.01, 0.1, 0.25), (1e-4, 0.9, 1.01)])
def test_what_rounding_loses_is_as_documented(ratio, least, most):
    model = Model.attach(llama(), LoRA(2), precision="bf16", overlay=False)
    path, part = next(iter(model.parts.items()))
    before = part.base.weight.float()
    update = Factors(torch.randn(64, 8), torch.randn(8, 64))
    update = Factors(update.U * ratio * before.norm() / update.dense().norm(), update.V)
    model.fold({path: (update,)})
    lost = (part.base.weight.float() - before - update.dense()).norm() / update.dense().norm()
    assert least < lost < most


def test_updates_stay_beside_a_base_that_is_in_half_precision():
    assert Model.attach(llama().bfloat16(), LoRA(2)).overlay
    assert not Model.attach(llama(), LoRA(2)).overlay


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rule(monkeypatch, has_bf16, stored):
    monkeypatch.setattr(devices, "has_bf16", lambda device: has_bf16)
    engine, half = Engine(device="cpu"), stored != torch.float32
    loads = {x: engine.loads_half(x, stored) for x in ("auto", "float32", "bf16-autocast", "bf16")}
    assert loads == {"auto": half and has_bf16, "float32": False, "bf16-autocast": False, "bf16": half}
    network = copy.deepcopy(llama()).to(torch.bfloat16 if loads["auto"] else torch.float32)
    assert engine.resolve_precision(Training(), network).precision == ("bf16" if loads["auto"] else "float32")
    note = engine.describe_loading("auto", stored)
    expected = {
        torch.float32: None,
        torch.bfloat16: None if has_bf16 else "held in float32, in twice the memory",
        torch.float16: "held in bfloat16, which rounds it by 3 bits" if has_bf16 else "held in float32",
    }[stored]
    assert note is None if expected is None else expected in note
    assert engine.describe_loading("float32", stored) is None
