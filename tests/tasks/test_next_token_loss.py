"""The loss in chunks against that of all logits: many families, heads that are trained, memory."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fedlora.adapters import LoRA
from fedlora.security.privacy.per_sample_gradients import compute_gradients
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.data.tokens import IGNORED
from fedlora.tasks.networks.next_token_loss import AllLogits, ChunkedLogits, SelectedLogits, loss_of, prepare_loss
from fedlora.tasks.seq2seq import Seq2Seq
from fedlora.training.device import checkpoint_activations
from fedlora.training.model import Model

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 61}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
GROUPED = {**SMALL, "num_key_value_heads": 1}
GEMMA = {**GROUPED, "head_dim": 16}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "cohere", "cohere2", "olmo2", "starcoder2"), GROUPED),
    **dict.fromkeys(("gpt_neox", "phi"), SMALL),
    **dict.fromkeys(("gemma", "qwen3"), GEMMA),
    "gemma2": {**GEMMA, "final_logit_softcapping": 0.5},  # below the logits, so that it matters
    "gemma3_text": {**GEMMA, "final_logit_softcapping": 0.5},
    "granite": {**GROUPED, "logits_scaling": 3.0},
    "gpt2": OLD,
    "gptj": {**OLD, "rotary_dim": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 61},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24},  # a decoder within the body, and a projection after it
}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48, "d_kv": 16, "vocab_size": 61}
BART = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
SEQ2SEQ = {
    "t5": {**T5, "decoder_start_token_id": 0},
    "mt5": {**T5, "decoder_start_token_id": 0, "tie_word_embeddings": False},
    "bart": {**BART, "d_model": 32, "vocab_size": 61},
}


def build(family):
    torch.manual_seed(0)
    auto, settings = (AutoModelForSeq2SeqLM, SEQ2SEQ) if family in SEQ2SEQ else (AutoModelForCausalLM, FAMILIES)
    network = auto.from_config(AutoConfig.for_model(family, **settings[family])).eval()
    with torch.no_grad():
        for name, x in network.named_parameters():
            if "norm" not in name:
                x.mul_(3)  # logits with large differences
            if name.endswith("bias"):
                x.normal_(generator=torch.Generator().manual_seed(1))
    return network


def draw_batch(seed=0):
    """Four rows, the last without anything to learn; whole columns are ignored, too."""
    draws = torch.Generator().manual_seed(seed)
    ids, learnt = torch.randint(3, 61, (4, 9), generator=draws), torch.rand(4, 9, generator=draws) < 0.6
    learnt[3], learnt[:, :2] = False, False
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(learnt, ids, IGNORED)}


def task_of(family):
    return Seq2Seq("unread") if family in SEQ2SEQ else CausalLM("unread")


def dense_loss(network, batch):
    """The mean cross-entropy as transformers computes it, from all logits."""
    return network(**batch, use_cache=False).loss


def divide(network, family, rows=3):
    """Prepare a network, then let a chunk have the logits of a few positions."""
    prepare_loss(network, task_of(family).probe(network))
    way = loss_of(network)
    assert isinstance(way, ChunkedLogits), f"{family} takes {way}"
    network.next_token_loss = ChunkedLogits(way.body, rows * 61)


def assert_near(found, expected, bound=1e-4):
    """Each tensor is right up to this share of its norm."""
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= bound * y.norm() + 1e-8 and y.norm() > 0


def gradients(network, loss, names):
    return torch.autograd.grad(loss, [network.get_parameter(name) for name in names])


@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ])
def test_chunks_give_loss_and_gradient_of_all_logits(family):
    network, batch, task = build(family), draw_batch(), task_of(family)
    head = {x.data_ptr() for x in network.get_output_embeddings().parameters()}
    names = [n for n, x in network.named_parameters() if x.ndim == 2 and x.data_ptr() not in head and "norm" not in n]
    names = [n for n in names if ".layers." in n or ".h." in n or ".block." in n]
    network.requires_grad_(False)
    for name in names:
        network.get_parameter(name).requires_grad_(True)
    right = dense_loss(network, batch)
    expected = gradients(network, right, names)
    with torch.no_grad():
        every = type(task).outputs(task, network, batch)  # by all logits: nothing was prepared
    divide(network, family)
    loss = task.loss(network, batch)
    torch.testing.assert_close(loss, right.detach(), rtol=1e-5, atol=1e-6, check_dtype=True)
    assert_near(gradients(network, loss, names), expected)
    with torch.no_grad():
        torch.testing.assert_close(task.outputs(network, batch), every, rtol=1e-5, atol=1e-6)
    assert every[3].tolist() == [0.0] * every.shape[1], "a row with nothing to learn"


def test_one_chunk_has_the_bits_of_all_logits():
    network, batch, task = build("gemma2"), draw_batch(), task_of("gemma2")
    name = "model.layers.0.self_attn.q_proj.weight"
    network.requires_grad_(False).get_parameter(name).requires_grad_(True)
    found = []
    for size in (None, 10**6):
        if size:
            network.next_token_loss = ChunkedLogits("model", size)
        loss = task.loss(network, batch)
        found.append((loss.detach(), *gradients(network, loss, [name])))
    assert all(torch.equal(x, y) for x, y in zip(*found))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5", "mt5"])
def test_a_head_that_is_trained_gets_its_gradient(family):
    """In full, and tied to the embedding where the family ties it: then the embedding's share is there, too."""
    network, batch, task = build(family), draw_batch(), task_of(family)
    network.requires_grad_(False)
    weight = network.get_output_embeddings().weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(dense_loss(network, batch), weight)
    divide(network, family)
    assert_near(torch.autograd.grad(task.loss(network, batch), weight), [expected])


@pytest.mark.parametrize("rows", [3, 10**6])
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ["q_proj"]])
@pytest.mark.parametrize("precision", ["float32", "bf16-autocast", "bf16"])
def test_an_adapted_head_and_per_sample_gradients(targets, precision, rows):
    """Each row's gradient, and that of the batch, are those of all logits, in every precision."""
    network, batch, task = build("llama"), draw_batch(), CausalLM("unread")
    network.put_on_top = []  # as of a network that ``CausalLM.network`` loads
    prepare_loss(network, task.probe(network))
    model = Model.attach(network, LoRA(rank=2, alpha=4.0), targets, precision=precision)
    model.load(
        {
            part: {leaf: torch.randn_like(x) * 0.3 for leaf, x in layer.items()}
            for part, layer in model.initial(0).items()
        }
    )
    trained = model.select({path: part.adapter.trainable for path, part in model.parts.items()})
    found = []
    for way in (AllLogits(), ChunkedLogits("model", rows * 61)):
        network.next_token_loss = way
        losses, each = compute_gradients(model, lambda network: task.losses(network, batch), 4, trained)
        whole = model.gradient(lambda network: task.loss(network, batch))
        found.append((losses, each, {(p, leaf): x for p, layer in whole.items() for leaf, x in layer.items()}))
    bound = {"rtol": 1e-3, "atol": 1e-5} if precision == "float32" else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(found[1], found[0], **bound)
    assert all(x.abs().max() > 0 for x in found[0][2].values())


def test_activation_checkpointing_and_accumulation():
    network, batch, task = build("qwen3"), draw_batch(), CausalLM("unread")
    network.put_on_top = []
    divide(network, "qwen3")
    model = Model.attach(network, LoRA(rank=2, alpha=4.0), ["q_proj", "down_proj"])
    model.load({p: {k: torch.randn_like(x) for k, x in layer.items()} for p, layer in model.initial(0).items()})
    parameters = list(model.select({path: part.adapter.trainable for path, part in model.parts.items()}).values())
    expected = torch.autograd.grad(dense_loss(network, batch) / 3, parameters)
    checkpoint_activations(network)
    network.train()
    found = torch.autograd.grad(task.loss(network, batch) / 3, parameters)
    assert_near(found, expected)


def test_a_batch_with_nothing_to_learn():
    network, batch, task = build("llama"), draw_batch(), CausalLM("unread")
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    divide(network, "llama")
    with torch.no_grad():
        assert task.outputs(network, batch).tolist() == [[0.0] * 3] * 4
    assert task.losses(network, batch).tolist() == [0.0] * 4
    assert task.loss(network, batch).isnan(), "as the mean of nothing is everywhere in torch"


class Shifted(nn.Module):
    """A causal language model that adds to its logits what depends on the input, as no head of hidden states can."""

    def __init__(self, place):
        super().__init__()
        self.net, self.place, self.config = build("llama"), place, build("llama").config
        self.model, self.lm_head = self.net.model, self.net.lm_head

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **options):
        output = self.model(input_ids=input_ids, **{k: x for k, x in options.items() if k != "labels"})
        hidden = output.last_hidden_state
        if self.place == "before":
            hidden = hidden + self.model.embed_tokens(input_ids)
        output.logits = self.lm_head(hidden)
        if self.place == "after":
            output.logits = output.logits + functional.one_hot(input_ids, 61)
        return output


@pytest.mark.parametrize(("place", "way"), [("before", SelectedLogits), ("after", AllLogits)])
def test_a_network_that_cannot_be_divided_takes_another_way_and_is_right(place, way):
    network, batch, task = Shifted(place).eval(), draw_batch(), CausalLM("unread")
    logits = network(batch["input_ids"], use_cache=False).logits
    right = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    prepare_loss(network, task.probe(network))
    assert isinstance(loss_of(network), way)
    torch.testing.assert_close(task.loss(network, batch), right)
    assert all(x.requires_grad for x in network.parameters()), "as before the test"


MEASURE = """
import json, sys, torch
from benchmarks.logits import build_network, draw_batch, measure_peaks
print(json.dumps(measure_peaks(sys.argv[1], build_network(32), draw_batch(4, 128), repeats=1)))
"""


@pytest.mark.parametrize("way", ["plain", "chunks"])
def test_peak_memory_with_a_vocabulary_of_262144(way):
    """Half of 512 positions are learnt, which is two chunks of 128 MiB of logits; all logits are 512 MiB."""
    out = subprocess.run([sys.executable, "-c", MEASURE, way], capture_output=True, text=True, check=True).stdout
    peaks = json.loads(out.splitlines()[-1])
    for name, bound in (("step", 600), ("evaluation", 450)):
        assert (peaks[name]["MiB"] < bound) == (way == "chunks"), f"{name}: {peaks[name]}"
