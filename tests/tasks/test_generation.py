"""Generated texts: batched as one by one, ended where they should, and nothing else is disturbed."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedlora.adapters import LoRA
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.networks.generation import GenerationSettings, generate
from fedlora.training.model import Model
from tests.fixtures.networks import FAMILIES, write_decoder

PROMPTS = ["Once upon a time", "The dog", "Lily and Tom went to the park to play. They saw a big", "Yes"]


@pytest.fixture(scope="module")
def made(shared):
    """The stories' network with adapters that change it, its tokenizer, and prompts."""
    place = str(shared / "models" / "stories260k-llama")
    task = CausalLM(data="unread")
    model = Model.attach(task.network(place, 0, 0), LoRA(4, 8))
    draws = torch.Generator().manual_seed(0)
    tree = {p: {leaf: 0.1 * torch.randn(x.shape, generator=draws) for leaf, x in layer.items()}
            for p, layer in model.initial(0).items()}  # fmt: skip
    model.load(tree)
    tokenizer = task.preprocessor(place)
    return model.network, tokenizer, tokenizer(PROMPTS)["input_ids"]


pytestmark = pytest.mark.shared


def alone(network, ids, steps):
    """Greedy, without a cache, without padding: the whole text anew for every token."""
    ids, network = list(ids), network.eval()
    start = len(ids)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == network.config.eos_token_id:
                return ids[start:-1]
    return ids[start:]


def test_a_batch_is_what_each_prompt_gives_alone(made):
    network, tokenizer, prompts = made
    texts = generate(network, tokenizer, prompts, GenerationSettings(24))
    assert texts == [generate(network, tokenizer, [ids], GenerationSettings(24))[0] for ids in prompts]
    assert texts == [tokenizer.decode(alone(network, ids, 24), skip_special_tokens=True) for ids in prompts]
    assert len(set(texts)) == 4


def test_the_adapters_count(made):
    network, tokenizer, prompts = made
    parts = [m for m in network.modules() if hasattr(m, "leaves")]
    before = generate(network, tokenizer, prompts, GenerationSettings(16))
    kept = [p.leaves["B"].data.clone() for p in parts]
    for part in parts:
        part.leaves["B"].data.zero_()
    after = generate(network, tokenizer, prompts, GenerationSettings(16))
    for part, x in zip(parts, kept):
        part.leaves["B"].data.copy_(x)
    assert before != after


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(made):
    network, tokenizer, prompts = made
    whole = generate(network, tokenizer, prompts, GenerationSettings(40))
    stop = whole[0][10:13]
    cut = generate(network, tokenizer, prompts, GenerationSettings(40, stop=(stop,)))
    assert cut == [text.split(stop)[0] for text in whole]
    assert cut[0] == whole[0].split(stop)[0] != whole[0]


def test_the_end_token_ends_a_text(made):
    network, tokenizer, prompts = made
    whole = generate(network, tokenizer, prompts[:1], GenerationSettings(30))[0]
    third = alone(network, prompts[0], 3)[-1]
    kept, network.generation_config.eos_token_id = network.generation_config.eos_token_id, [2, third]
    try:
        short = generate(network, tokenizer, prompts[:1], GenerationSettings(30))[0]
    finally:
        network.generation_config.eos_token_id = kept
    assert whole.startswith(short) and len(short) < len(whole)


def test_draws_come_from_the_seed_and_nothing_is_disturbed(made):
    network, tokenizer, prompts = made
    network.train()
    network.generation_config.repetition_penalty = 5.0  # a checkpoint's own settings are not ours
    settings = network.generation_config
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drawn = [generate(network, tokenizer, prompts, GenerationSettings(12, temperature=1.5), seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected), "the global generator is as it was"
    assert drawn[0] == drawn[1] != drawn[2]
    assert network.training and network.generation_config is settings
    network.eval()
    ours = generate(network, tokenizer, prompts, GenerationSettings(12))
    settings.repetition_penalty = None
    assert ours == generate(network, tokenizer, prompts, GenerationSettings(12))


def test_the_likeliest_share_alone_is_greedy(made):
    network, tokenizer, prompts = made
    greedy = generate(network, tokenizer, prompts, GenerationSettings(12))
    assert generate(network, tokenizer, prompts, GenerationSettings(12, temperature=1.0, top_p=1e-6), 3) == greedy


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"stop": ("",)}]
)
def test_mistakes(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GenerationSettings(**settings)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_is_not_read(family, tmp_path):
    """GPT-2 has absolute positions, which padding must not shift; a row that ends early must not change the others."""
    write_decoder(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    sizes = {
        **FAMILIES[family],
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    wide = AutoConfig.for_model(family, **sizes, initializer_range=0.5)
    network = AutoModelForCausalLM.from_config(wide).eval()
    prompts = tokenizer(["a", "three words here", "Once upon a time, far away", "b!"])["input_ids"]
    free = [alone(network, ids, 16) for ids in prompts]
    ended = free[0][5]
    network.config.eos_token_id = network.generation_config.eos_token_id = ended
    expected = [ids[: ids.index(ended)] if ended in ids else ids for ids in free]
    assert len({tuple(ids) for ids in free}) == 4 and len(expected[0]) < 16 and max(map(len, expected)) == 16
    assert generate(network, tokenizer, prompts, GenerationSettings(16)) == tokenizer.batch_decode(
        expected, skip_special_tokens=True
    )
