"""What stands in for a reader's own things where a page's blocks are run, and the README's blocks that are not run."""

import string
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

QUICK = """\
rounds = 1
model = { name = "demo-vit" }
task = { name = "image-classification", data = "digits", train_rows = 90, test_rows = 40 }
clients = { count = 3, split = { name = "dirichlet", alpha = 1.0 } }
adapter = { name = "lora", rank = 2, alpha = 4 }
training = { local_steps = 1, batch_size = 8, learning_rate = 5e-3 }
"""

# README.md bears no comments. How a block begins -> why it is not run:
README_NOT_RUN = {
    "src/fedlora/": "the tree of files, which is only read",
    "make demo": "they set up an environment of their own; CI's first steps are these commands",
    "fedlora chat": "needs a language model and benchmark data; tests/test_chat.py and tests/test_sandbox.py run these",
    "fedlora run mine.toml --engine": "starts Ray and processes; tests/flower runs each of these commands",
}
# How a block begins -> what has to be there before it.
README_BEFORE = {
    "fedlora aggregate": "fedlora export runs/mine-1 --all-clients --out parts\n"
    "mv parts/0 client-a && mv parts/1 client-b && mv parts/2 client-c",
}
# As the README's own, in small.
README_CONFIG = QUICK + 'method = { name = "fedsa-lora" }\n'


def quick(folder: Path, name: str) -> None:
    """A small configuration of the embedded demo under a page's name for it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(QUICK)


def encoder(folder: Path, name: str) -> None:
    """A text encoder that has learnt nothing, and spells every word, under a page's name for a pretrained one."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / name).mkdir()
    (folder / name / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / name / "vocab.txt")).save_pretrained(folder / name)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **small)).save_pretrained(folder / name)
