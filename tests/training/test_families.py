"""Families of language models of 2025 and 2026, at random weights: default targets, one step, experts refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from fedlora.adapters import LoRA
from fedlora.training.model import Model
from fedlora.training.parts import AdaptedLinear
from fedlora.training.targets import find_targets

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SPLIT, FUSED = {"q_proj", "v_proj"}, {"qkv_proj"}
FAMILIES = {
    "qwen3": ({}, SPLIT), "gemma3_text": ({}, SPLIT), "llama4_text": ({**MIXTURE, "intermediate_size_mlp": 32}, SPLIT),
    "mistral": ({}, SPLIT), "ministral": ({}, SPLIT), "ministral3": ({}, SPLIT), "smollm3": ({}, SPLIT),
    "gpt_oss": (MIXTURE, SPLIT), "qwen3_moe": (MIXTURE, SPLIT), "mixtral": (MIXTURE, SPLIT), "phi3": ({}, FUSED),
    "phi": ({}, SPLIT), "gpt_neox": ({}, {"query_key_value"}),
}  # fmt: skip


def network(family):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family][0]})).eval()
    base.put_on_top = []  # as a loaded checkpoint: no head is new
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_targets_are_query_and_value_and_learn(family):
    base = network(family)
    layers = base.config.num_hidden_layers
    model = Model.attach(base, LoRA(2))
    adapted = [path for path, part in model.parts.items() if isinstance(part.module, AdaptedLinear)]
    names = FAMILIES[family][1]
    assert {path.rpartition(".")[2] for path in adapted} == names and len(adapted) == layers * len(names)
    assert set(adapted) == model.parts.keys(), "nothing is trained in full"
    model.load(model.initial(0))
    ids = torch.arange(1, 21).reshape(2, 10)

    def loss(net):
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    gradient = model.gradient(loss)
    assert all(x["B"].abs().max() > 0 for x in gradient.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_peft(family):
    model, ids = Model.attach(network(family), LoRA(2, alpha=4)), torch.arange(1, 21).reshape(2, 10)
    draws = torch.Generator().manual_seed(1)
    tree = {path: {**x, "B": torch.randn(x["B"].shape, generator=draws)} for path, x in model.initial(0).items()}
    model.load(tree)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=sorted(FAMILIES[family][1]), task_type="CAUSAL_LM")
    theirs = get_peft_model(network(family), settings).eval()
    lora = {name: x for name, x in theirs.named_parameters() if "lora_" in name}
    assert len(lora) == 2 * len(tree)
    with torch.no_grad():
        before = theirs(input_ids=ids).logits
        for path, layer in tree.items():
            for leaf, x in layer.items():
                lora[f"base_model.model.{path}.lora_{leaf}.default.weight"].copy_(x)
        after, own = theirs(input_ids=ids).logits, model.network(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-3), "the adapter has an effect"
    torch.testing.assert_close(own, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss", "qwen3_moe", "mixtral"])
def test_stacked_experts_are_refused_with_the_reason(family):
    with pytest.raises(ValueError, match="a parameter and no linear layer, such as the stacked experts of a mixture"):
        find_targets(network(family), ["experts.gate_up_proj"])
    every = find_targets(network(family), "all-linear")
    assert every and not any(path.endswith(("lm_head", "experts")) for path in every)
