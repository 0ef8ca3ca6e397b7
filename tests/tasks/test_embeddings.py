"""Rows that a network has no embedding for are one sentence at loading, and leave no run folder."""

import csv
import string

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import fedlora
from fedlora.tasks.networks.generation import GenerationSettings, generate
from tests.fixtures.federation import config

LETTERS = string.ascii_lowercase
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def world(tmp_path):
    """``world(kind, tokens, **settings)``: a configuration of a text encoder with these settings and added tokens."""
    with open(tmp_path / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "other", "label"), *((f"ab{c}" * 4, c, "xy"[i % 2]) for i, c in enumerate(LETTERS))]
        )
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))

    def build(kind=BertForSequenceClassification, added=(), text="text", pad="[PAD]", **settings):
        made = {BertForSequenceClassification: BertConfig, RobertaForSequenceClassification: RobertaConfig}[kind]
        torch.manual_seed(0)
        kind(made(**{"vocab_size": len(WORDS), **SMALL, **settings})).save_pretrained(tmp_path / "model")
        tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
        tokenizer.add_tokens(list(added))
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(tmp_path / "model")
        return config(
            f"task={{name='text-classification', data='{tmp_path / 'data.csv'}', text={text!r}}}",
            f"model.name='{tmp_path / 'model'}'", "rounds=1", "training.local_steps=1", "clients.partition={name='iid'}",
        )  # fmt: skip

    return build


def test_a_tokenizer_longer_than_the_embedding(world, tmp_path):
    made = world(added=["abz"])
    with pytest.raises(
        ValueError, match=f"token number {len(WORDS)}, but the model .* has embeddings for {len(WORDS)}"
    ):
        fedlora.run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_longer_tokenizer_is_no_mistake_where_its_tokens_are_not_used(world, tmp_path):
    fedlora.run(world(added=["unused"]), tmp_path / "run")


def test_a_padding_token_without_an_embedding(world, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer is longer than its embedding"):
        fedlora.run(world(added=["<pad>"], pad="<pad>"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_places_that_the_model_has_not(world, tmp_path):
    with pytest.raises(
        ValueError, match="come to 14 tokens, but the model .* reads at most 9; set task.max_length to 9"
    ):
        fedlora.run(world(max_position_embeddings=9), tmp_path / "run")
    made = world(RobertaForSequenceClassification, max_position_embeddings=12, pad_token_id=0, type_vocab_size=2)
    with pytest.raises(ValueError, match="reads at most 11; set task.max_length to 11"):
        fedlora.run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pairs_for_a_model_of_single_texts(world, tmp_path):
    with pytest.raises(ValueError, match="marks the second text of a pair by 1, but the model knows 1 kinds of text"):
        fedlora.run(world(text=["text", "other"], type_vocab_size=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prompt_with_a_token_that_the_model_has_not():
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))

    class Tokenizer:
        pad_token_id = bos_token_id = eos_token_id = 1

    with pytest.raises(ValueError, match="the prompts hold the token number 20, but .* has embeddings for 20 tokens"):
        generate(network, Tokenizer(), [[3, 20]], GenerationSettings(1))
