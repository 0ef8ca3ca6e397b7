"""Which weights are adapted: names, ``all-linear`` and regular expressions as PEFT reads them, and what names nothing."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fedlora.adapters import LoRA
from fedlora.schema import ConfigError
from fedlora.training.model import Model
from fedlora.training.parts import AdaptedLinear
from fedlora.training.targets import find_targets, matches
from tests.fixtures.federation import config
from tests.fixtures.networks import network


def gpt2():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))  # fmt: skip


def t5():
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0))  # fmt: skip


NETWORKS = {
    "bert": (lambda: network("bert"), {"task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
    "t5": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
}


def of_peft(base, targets, **settings):
    model = get_peft_model(base, LoraConfig(target_modules=targets, **settings))
    return {path.removeprefix("base_model.model.") for path, x in model.named_modules() if isinstance(x, LoraLayer)}


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        "ALL-Linear",
        r".*(attention|attn|Attention)\..*(query|c_proj|q)",
        r".*\.(0|1)\..*(dense|c_attn|wo)",
    ],
)
def test_one_text_is_read_as_peft_reads_it(family, targets):
    made, settings = NETWORKS[family]
    model = Model.attach(made(), LoRA(2), targets, head=["classifier"] if family == "bert" else [])
    found = {path for path, part in model.parts.items() if isinstance(part.module, AdaptedLinear)}
    assert found and found == of_peft(made(), targets, **settings)


def test_all_linear_leaves_out_a_head_of_ones_own():
    everything = find_targets(network("bert"), "all-linear")
    model = Model.attach(network("bert"), LoRA(2), "all-linear", head=["pooler"])
    assert everything.keys() - {p for p, part in model.parts.items() if isinstance(part.module, AdaptedLinear)} == {
        "bert.pooler.dense"
    }


class Stacked(nn.Module):
    """Experts as transformers stacks them: one parameter of all."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 8))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))}) for _ in range(2)
        )
        self.fc, self.words, self.experts = nn.Linear(4, 4), nn.Embedding(5, 4), Stacked()


@pytest.mark.parametrize("pattern", ["mpl.0", "mlp.1", "mlp_0", "layers.0.mpl.2", "7"])
def test_near_names_in_a_sequential_are_names_that_match(pattern):
    """``near names are fc, 0, 2`` named nothing that a reader could write."""
    with pytest.raises(ValueError, match="model.targets has") as caught:
        find_targets(Odd(), [pattern])
    near = re.search(
        r"near names are (.*?) \(one is '(.*?)'(?:, and the pattern '(.*?)' matches all of them)?\)", str(caught.value)
    )
    assert near, str(caught.value)
    names, path, alike = near.groups()
    assert not any(name.isdigit() for name in names.split(", ")) and "mlp.0" in names
    assert all(find_targets(Odd(), [name]) for name in [*names.split(", "), path, *([alike] if alike else [])])
    if path.startswith("layers"):
        assert len(find_targets(Odd(), [alike])) > 1
        assert matches(path, alike)


UNKNOWN = {
    "experts": (
        ["experts.gate_up_proj"],
        r"names 'experts.gate_up_proj' \(4 x 6 x 8\), .*stacked experts of a mixture",
    ),
    "embedding": (["words"], "names 'words', of the kind Embedding, where only linear layers can be adapted"),
    "activation": (["layers.1.mlp.1"], "names 'layers.1.mlp.1', of the kind ReLU, where only linear"),
    "a name as one text": ("fc2", "one text is a regular expression of whole paths, and names go into a list"),
    "a path's end as one text": ("mlp.0", "'mlp.0', which matches no module .*names go into a list"),
    "no expression": ("*.mlp", r"'\*.mlp', not a valid regular expression .*'all-linear'"),
    "all-linear in a list": (["all-linear"], "has 'all-linear', which matches no module"),
}


@pytest.mark.parametrize(("targets", "sentence"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_names_no_linear_layer_says_why(targets, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        find_targets(Odd(), targets)
    assert str(caught.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    ("targets", "head", "sentence"),
    [
        (["fc"], ["fcc"], r"model.head has 'fcc'"),
        (["fc"], ["fc"], r"'fc' is named in model.targets and in model.head"),
        (None, [], r"none of the usual query and value projections; set model.targets"),
    ],
)
def test_other_names_of_the_user_are_errors_of_the_configuration(targets, head, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Model.attach(Odd(), LoRA(2), targets, head=head)


def test_one_text_in_a_configuration():
    every, some = (
        config(f"model.targets={text}").federation().model.parts for text in ("all-linear", r"'.*\.0\..*(q|v)_proj'")
    )
    assert len(some) == 3 and {p.rsplit(".")[-1] for p in some} == {"q_proj", "v_proj", "classifier"}
    assert every.keys() > some.keys()
    assert config("model.targets=all-linear").table["model"]["targets"] == "all-linear"
    with pytest.raises(ConfigError, match="model.targets is 3"):
        config("model.targets=3")
