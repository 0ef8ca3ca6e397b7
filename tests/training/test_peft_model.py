"""A model of PEFT as it is: its adapters, scales and layouts against PEFT's own forward pass, and what is refused."""

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fedlora
from fedlora.training.open_model import find_adapter, open_model
from fedlora.training.peft_model import attach_peft
from fedlora.types import Factors
from tests.fixtures.own_trainers import SEED, bert, difference, lora, own_turn, peft_bert, words

IDS = torch.arange(3, 21).reshape(3, 6)


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 8}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2)
    )


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=16)).to(dtype)


CASES = {
    "lora": (bert, lora()),
    "rslora": (bert, lora(r=4, use_rslora=True)),
    "patterns": (bert, lora(rank_pattern={"layer.0.attention.self.query": 3}, alpha_pattern={"layer.1.*value": 9})),
    "every linear layer": (bert, lora(target_modules="all-linear")),
    "a part of the layers": (bert, lora(layers_to_transform=[1])),
    "gpt2": (gpt2, peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "llama": (llama, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])),
    "vera": (bert, peft.VeraConfig(r=5, target_modules=["query", "value"], modules_to_save=["classifier"])),
}


def opened(name):
    """A model of PEFT whose adapters are not zero, and its ``Model``."""
    base, config = CASES[name]
    network = peft.get_peft_model(base(), config)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in network.parameters():
            if x.requires_grad:
                x += 0.1 * torch.randn(x.shape, generator=draws)
    return network.eval(), attach_peft(network)


@pytest.mark.parametrize("name", CASES)
def test_updates_of_weights_are_those_of_peft(name):
    """The update that methods combine is the one that PEFT merges, weight by weight, for all layouts and scales."""
    network, model = opened(name)
    tree, adapted = model.initial(0), 0
    for path, part in model.parts.items():
        if part.base is None:
            continue
        delta = part.adapter.delta(tree[path]).dense()
        merged = part.module.get_delta_weight("default")
        torch.testing.assert_close(delta.mT if part.is_transposed else delta, merged, rtol=1e-5, atol=1e-6)
        adapted += 1
    assert adapted == sum(hasattr(x, "get_base_layer") and not isinstance(x, nn.Embedding) for x in network.modules())


@pytest.mark.parametrize("name", CASES)
def test_loading_sets_every_leaf_and_reset_brings_back_the_first(name):
    network, model = opened(name)
    with torch.no_grad():
        before = network(input_ids=IDS).logits.clone()
        tree = model.initial(0)
        other = {p: {k: x if k not in model.parts[p].adapter.trainable else x + 1 for k, x in layer.items()} for p, layer in tree.items()}  # fmt: skip
        model.load(other)
        assert difference(model.read(), other) < 1e-7
        assert not torch.equal(network(input_ids=IDS).logits, before)
        model.reset(0)
        assert torch.equal(network(input_ids=IDS).logits, before)
    assert {id(x) for x in network.parameters() if x.requires_grad} == {
        id(x) for p in model.parts.values() for k, x in p.leaves.items() if k in p.adapter.trainable
    }


@pytest.mark.parametrize("name", [name for name in CASES if name != "vera"])
def test_a_base_update_adds_what_it_says(name):
    _, model = opened(name)
    path, part = next((path, part) for path, part in model.parts.items() if part.base is not None)
    m, n = part.shape
    draws = torch.Generator().manual_seed(2)
    update = Factors(torch.randn(m, 2, generator=draws), torch.randn(2, n, generator=draws))
    x = torch.randn(4, n, generator=draws)
    with torch.no_grad():
        before, weight = part.module(x), part.base.weight.clone()
        model.fold({path: (update,)})
        torch.testing.assert_close(part.module(x) - before, x @ update.dense().mT, rtol=1e-4, atol=1e-4)
        model.unfold()
        assert torch.equal(part.module(x), before) and torch.equal(part.base.weight, weight)


def test_base_updates_of_a_bfloat16_base_are_kept_beside_it():
    network = peft.get_peft_model(llama(torch.bfloat16), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = attach_peft(network)
    (path, part), x = next(iter(model.parts.items())), torch.randn(3, 16, dtype=torch.bfloat16)
    small = Factors(torch.full((16, 1), 1e-4), torch.full((1, 16), 1e-4))  # lost if it were added to the weight
    weight = part.base.weight.clone()
    with torch.no_grad():
        before = part.module(x)
        for _ in range(3):
            model.fold({path: (Factors(100 * small.U, 100 * small.V),)})
        assert torch.equal(part.base.weight, weight)
        torch.testing.assert_close(part.overlay.dense(), torch.full((16, 16), 3e-4), rtol=1e-4, atol=1e-8)
        assert not torch.equal(part.module(x), before)
        model.reset(0)
        assert torch.equal(part.module(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_adapter_on_one_base_begins_with_what_the_base_is(dtype):
    """A new adapter in place of the old one finds the pretrained base; after a merge the merged one is the base."""
    config, path = peft.LoraConfig(r=2, target_modules=["q_proj"]), "model.layers.0.self_attn.q_proj"
    base = llama(dtype)
    update = {path: (Factors(torch.full((16, 1), 0.1), torch.ones(1, 16)),)}
    with torch.no_grad():
        pretrained = base(input_ids=IDS).logits.clone()
        open_model(peft.get_peft_model(base, config)).fold(update)
        with pytest.warns(UserWarning, match="second time|multiple adapters"):
            again = peft.get_peft_model(base, config)  # as an app does that keeps its base between messages
        assert not torch.equal(again(input_ids=IDS).logits, pretrained)
        model = open_model(again)
        assert torch.equal(again(input_ids=IDS).logits, pretrained)
        model.fold(update)
        merged = again.merge_and_unload()
        after = merged(input_ids=IDS).logits.clone()
        assert not torch.equal(after, pretrained)
        network = peft.get_peft_model(merged, config)
        model = open_model(network)
        assert torch.equal(network(input_ids=IDS).logits, after), "what was merged is this adapter's base"
        model.fold(update)
        assert not torch.equal(network(input_ids=IDS).logits, after)
        model.unfold()
        assert torch.equal(network(input_ids=IDS).logits, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_methods_that_change_the_base_on_llama(method, dtype):
    network = peft.get_peft_model(llama(dtype), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    weight = network.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    session = fedlora.Session(network, method, 2, seed=SEED)
    for _ in range(2):
        for k in session.cohort():
            with session.client(k) as model:
                own_turn(model, [{"input_ids": row, "labels": row} for row in words(k)[0].ids], session.round - 1, k)
        session.aggregate()
    assert torch.equal(weight, before) == (dtype == torch.bfloat16)
    errors = [record["weights"] for record in session.records]
    assert all(error["served"] < 1e-4 for weights in errors for error in weights.values()), "both are exact"


def test_vera_of_peft_is_fedloras_and_stays_in_step():
    """A session on PEFT's VeRA: the frozen pair is shared, and the mean of d and b is FedIT's."""
    network = peft.get_peft_model(bert(), CASES["vera"][1])
    start = {name: x.clone() for name, x in network.named_parameters() if "vera_lambda" in name}
    session, ends = fedlora.Session(network, "fedit", 2, seed=SEED), []
    for k in session.cohort():
        with session.client(k, examples=(1, 3)[k]) as model:
            assert all(torch.equal(x, start[name]) for name, x in model.named_parameters() if name in start)
            own_turn(model, words(k)[0], 0, k)
            ends.append({name: x.detach().clone() for name, x in model.named_parameters() if name in start})
    session.aggregate()
    session.model()
    for name, x in network.named_parameters():
        if name in start:
            torch.testing.assert_close(x.detach(), ends[0][name] / 4 + ends[1][name] * 3 / 4)
            assert not torch.equal(ends[0][name], start[name])
    assert find_adapter(open_model(network)) == fedlora.VeRA(5, network.peft_config["default"].d_initial, 0)


def test_ranks_of_clients_keep_their_scale():
    model = attach_peft(peft_bert(r=4))
    path = "bert.encoder.layer.0.attention.self.query"
    layer = model.parts[path].module
    tree = model.initial(0)
    rule = model.parts[path].adapter
    model.load({p: rule.leading(x, 2) if "A" in x else x for p, x in tree.items()})
    assert layer.r["default"] == 2 and layer.scaling["default"] == rule.scale(2) == 2.0
    assert layer.lora_A["default"].weight.shape == (2, 16) and layer.lora_A["default"].out_features == 2
    model.reset(0)
    assert layer.r["default"] == 4 and layer.scaling["default"] == 1.0


# ----------------------------------------------------------------------------------------------------- refusals
def both():
    network = peft.get_peft_model(bert(), lora(modules_to_save=None))
    network.add_adapter("more", lora(modules_to_save=None))
    network.base_model.set_adapter(["default", "more"])
    return network


def merged():
    network = peft_bert()
    network.merge_adapter()
    return network


def disabled():
    network = peft_bert()
    network.base_model.disable_adapter_layers()
    network.requires_grad_(False)
    return network


def unfrozen():
    network = peft_bert()
    network.get_submodule("base_model.model.bert.pooler.dense").requires_grad_(True)
    return network


def rescaled():
    network = peft_bert()
    network.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query").set_scale("default", 3.0)
    return network


def plain(config, base=bert):
    return lambda: peft.get_peft_model(base(), config)


REFUSED = {
    "no adapter": (bert, "the model is a BertForSequenceClassification; give what PEFT's get_peft_model returns"),
    "two adapters": (both, "the adapters default, more are active on .*, and the model trains 'default'; call model.set_adapter"),
    "merged": (merged, "is merged into the base; call unmerge_adapter"),
    "disabled": (disabled, "is disabled; call unmerge_adapter.* or enable it"),
    "trainable beside": (unfrozen, "'base_model.model.bert.pooler.dense.weight' is trainable and belongs to no adapter"),
    "scale": (rescaled, "has the scale 6.0, and its configuration says 2.0; set the scale by lora_alpha"),
    "dora": (plain(lora(use_dora=True)), "the LoraConfig sets use_dora, which cannot be used"),
    "pissa": (plain(lora(init_lora_weights="pissa")), "the LoraConfig sets init_lora_weights to 'pissa'"),
    "bias": (plain(lora(bias="all")), "the LoraConfig sets bias to 'all'"),
    "bias inside": (plain(lora(lora_bias=True)), "the LoraConfig sets lora_bias"),
    "tokens": (plain(lora(trainable_token_indices={"word_embeddings": [1, 2]})), "the LoraConfig sets trainable_token_indices"),
    "embeddings": (plain(lora(target_modules=["query", "word_embeddings"])), "adapts an embedding .*word_embeddings"),
    "kind": (plain(peft.IA3Config(target_modules=["query"], feedforward_modules=[])), "of PEFT's kind 'IA3'"),
    "vera's bias": (plain(peft.VeraConfig(r=2, target_modules=["query"], bias="all")), "the VeraConfig sets bias to 'all'"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_one_sentence(name):
    make, text = REFUSED[name]
    network = make()
    with pytest.raises(ValueError, match=text) as error:
        open_model(network)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_convolution_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.conv(x)

    network = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(ValueError, match="adapts 'conv', a Conv2d; only linear layers can be combined here"):
        open_model(network)
