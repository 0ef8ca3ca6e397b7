"""Attachment, the five doors, and PEFT as the oracle."""

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageClassification

from fedlora.adapters import LoRA, MultiHead, VeRA
from fedlora.training.model import Model
from fedlora.types import Factors
from tests.fixtures.networks import FAMILIES, network


def filled(model: Model, seed: int = 1):
    """Leaves with something in them."""
    g = torch.Generator().manual_seed(seed)
    return {
        part: {
            leaf: x + 0.1 * torch.randn(x.shape, generator=g) if leaf in model.parts[part].adapter.trainable else x
            for leaf, x in layer.items()
        }
        for part, layer in model.initial(0).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_and_heads(family):
    model = Model.attach(network(family), LoRA(2))
    kinds = {type(part.adapter).__name__ for part in model.parts.values()}
    assert kinds == {"LoRA", "Dense"}
    free = [name for name, x in model.network.named_parameters() if x.requires_grad]
    assert not free, "nothing trains before a turn says so"


def test_default_targets_of_vision():
    config = AutoConfig.for_model("vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4)  # fmt: skip
    model = Model.attach(AutoModelForImageClassification.from_config(config), LoRA(2))
    assert sum(isinstance(part.adapter, LoRA) for part in model.parts.values()) == 2


@pytest.mark.parametrize("family,targets", [("bert", ["query", "intermediate.dense"]), ("gpt2", ["c_attn", "c_fc"])])
@pytest.mark.parametrize("adapter", [LoRA(4, 8), LoRA(4, 8, use_rslora=True), VeRA(16)], ids=["lora", "rslora", "vera"])
def test_forward_and_gradients_equal_pefts(family, targets, adapter):
    """Linear and Conv1D, square and not; on the same leaves to 1e-6."""
    model = Model.attach(network(family), adapter, targets)
    tree = filled(model)
    theirs = peft_of(network(family), family, targets, adapter)
    if isinstance(adapter, VeRA):
        tree = with_pefts_projections(tree, theirs)
    model.load(tree)
    copy_into_peft(tree, theirs, adapter)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(2))
    ours_out, their_out = model.network(ids).logits, theirs(ids).logits
    torch.testing.assert_close(ours_out, their_out, rtol=1e-6, atol=1e-6)
    gradient = model.gradient(lambda n: n(ids).logits.square().sum())
    their_out.square().sum().backward()
    for part, leaf, theirs_grad in peft_gradients(tree, theirs, adapter):
        torch.testing.assert_close(gradient[part][leaf], theirs_grad, rtol=1e-5, atol=1e-6)


def peft_of(base, family, targets, adapter):
    shared = {"target_modules": targets, "fan_in_fan_out": family == "gpt2"}
    if isinstance(adapter, VeRA):
        return get_peft_model(base, VeraConfig(r=16, **shared)).eval()
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, use_rslora=adapter.use_rslora, **shared)).eval()


def modules(tree, theirs):
    return {part: theirs.base_model.model.get_submodule(part) for part in tree}


def with_pefts_projections(tree, theirs):
    """PEFT slices one pair for all weights; ours takes the slices as its frozen leaves."""
    found = {}
    for part, module in modules(tree, theirs).items():
        layer = dict(tree[part])
        if "d" in layer:
            m, n = layer["B"].shape[0], layer["A"].shape[1]
            layer |= {"A": module.vera_A["default"][:, :n].clone(), "B": module.vera_B["default"][:m].clone()}
        found[part] = layer
    return found


def leaves_of(module, layer, adapter):
    if "d" in layer:
        return {"d": module.vera_lambda_d["default"], "b": module.vera_lambda_b["default"]}
    if "A" in layer:
        return {"A": module.lora_A["default"].weight, "B": module.lora_B["default"].weight}
    return {}


def copy_into_peft(tree, theirs, adapter):
    with torch.no_grad():
        for part, module in modules(tree, theirs).items():
            for leaf, parameter in leaves_of(module, tree[part], adapter).items():
                parameter.copy_(tree[part][leaf])
            if not leaves_of(module, tree[part], adapter):
                for leaf, value in tree[part].items():
                    getattr(module, leaf).copy_(value)


def peft_gradients(tree, theirs, adapter):
    for part, module in modules(tree, theirs).items():
        for leaf, parameter in leaves_of(module, tree[part], adapter).items():
            yield part, leaf, parameter.grad


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("adapter", [LoRA(4, 8), VeRA(8), MultiHead(2, 5)], ids=["lora", "vera", "heads"])
def test_folding_the_update_is_running_it(family, adapter):
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(2))
    model = Model.attach(
        network(family), adapter, ["query", "intermediate.dense"] if family == "bert" else ["c_attn", "c_fc"]
    )
    tree = filled(model)
    model.load(tree)
    with torch.inference_mode():
        wanted = model.network(ids).logits
    deltas = {part: [adapter.delta(tree[part])] for part in tree if part not in ("classifier", "score")}
    model.load({p: (x if p in ("classifier", "score") else model.initial(0)[p]) for p, x in tree.items()})
    model.fold(deltas)
    with torch.inference_mode():
        torch.testing.assert_close(model.network(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_load_is_total():
    model = Model.attach(network("bert"), LoRA(2))
    tree = filled(model)
    model.load(tree)
    assert all(torch.equal(x, model.read()[p][leaf]) for p, layer in tree.items() for leaf, x in layer.items())
    with pytest.raises(ValueError, match="missing or unknown"):
        model.load({p: x for p, x in tree.items() if p != "classifier"})
    with pytest.raises(ValueError, match=r"leaves \['B'\] do not fit"):
        first = next(iter(tree))
        model.load({**tree, first: {"A": tree[first]["A"]}})
    with pytest.raises(ValueError, match="no base weight"):
        model.fold({"classifier": [Factors(torch.zeros(3, 1), torch.zeros(1, 48))]})


def test_frozen_weights_never_move_and_exist_once():
    base = network("bert")
    before = {name: x.clone() for name, x in base.state_dict().items()}
    model = Model.attach(base, LoRA(2))
    for seed in range(3):
        model.load(filled(model, seed))
    after = {name.replace(".base.", "."): x for name, x in model.network.state_dict().items()}
    assert all(torch.equal(x, after[name]) for name, x in before.items() if not name.startswith("classifier"))


def test_bf16_keeps_the_leaves_in_float32():
    model = Model.attach(network("bert"), LoRA(2), precision="bf16")
    model.load(filled(model))
    assert {x.dtype for layer in model.read().values() for x in layer.values()} == {torch.float32}
    assert model.network.bert.encoder.layer[0].attention.self.query.base.weight.dtype == torch.bfloat16


def test_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"'classifier' is named in model.targets and in model.head"):
        Model.attach(network("bert"), LoRA(2), ["classifier"])
