"""The bits that every method's run comes to: ``python -m scripts.run_hashes [--write FILE | --against FILE]``.

Each method is run on pictures, on text and with a causal language model, all tiny and without training before; some
methods are also run with privacy, codecs, clients of unequal ranks and other settings, one is resumed, and two run over
Flower messages in memory. A change that is to leave results as they are leaves every hash as it is: write the file
before it, compare after it.
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.fixtures.federation import TABLE, config, settings
from tests.fixtures.flower import World
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import fedlora
from fedlora.methods import METHODS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "0", "1"]
TIMES = {"seconds", "began", "ended"}  # of a record: what the clock says
VARIANTS = {  # of the run on pictures: a method, and settings
    "dropout": ("fedit", "clients.dropout=0.4", "clients.count=4", "clients.stragglers=0.5"),
    "ranks": ("flora", "clients.ranks=[1,2,2]"),
    "ranks of products": ("flexlora", "clients.ranks=[1,2,2]"),
    "heads": ("ravan", "clients.ranks=[1,2,2]"),
    "example privacy": ("fedit", "privacy.level=example", "privacy.noise_multiplier=1.0"),
    "client privacy": ("ffa-lora", "privacy.level=client", "privacy.noise_multiplier=1.0", "method.weighting=uniform"),
    "int8": ("fedsa-lora", "compression.up=int8"),
    "top-k": ("fedit", "compression={up='top-k', top_k=0.2}"),
    "krum": ("fedit", "clients.count=4", "robust.name=krum", "attack={name='sign-flip', clients=[1]}"),
    "trimmed": ("fedex-lora", "robust={name='trimmed', attackers=0.34}"),
    "server optimiser": ("fedit", "server.optimizer=adam", "clients.per_round=2"),
}


def write_models(folder: Path) -> None:
    """A BERT and a Llama of one layer, with a tokenizer of words, as folders ``bert`` and ``llama``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[SEP]",
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    small = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "max_position_embeddings": 64, "pad_token_id": 0}
    for name, network in (
        ("bert", BertForSequenceClassification(BertConfig(**small))),
        ("llama", LlamaForCausalLM(LlamaConfig(**small, eos_token_id=3))),
    ):
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_rows(folder: Path) -> None:
    """Sixty rows, whose label is whether the first letter stands before the second."""
    letters = WORDS[5:31]
    pairs = [(letters[7 * i % 26], letters[11 * i % 26]) for i in range(1, 61)]
    rows = [
        {"text": f"{a} {b}", "label": str(int(a < b)), "prompt": f"{a} {b}", "response": str(int(a < b))}
        for a, b in pairs
    ]
    for split, some in (("train", rows[:40]), ("test", rows[40:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, some)))


def tables(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations, without a method."""
    rest = {key: value for key, value in TABLE.items() if key not in ("model", "task")}
    split = {"clients": {"count": 3, "partition": {"name": "iid"}}}
    words = {"data": str(folder)}
    return {
        "images": TABLE,
        "text": rest | split | {
            "model": {"name": str(folder / "bert"), "targets": ["query", "value"]},
            "task": {"name": "text-classification", **words, "label_names": ["0", "1"]},
        },
        "causal-lm": rest | split | {
            "model": {"name": str(folder / "llama"), "targets": ["q_proj", "v_proj"]},
            "task": {"name": "causal-lm", **words, "prompt": "{prompt}", "response": "{response}"},
        },
    }  # fmt: skip


def numbers(value: Any) -> Iterator[str]:
    """All numbers of a record but the clock's, whatever they are called."""
    if isinstance(value, dict):
        for part in (part for name, part in value.items() if name not in TIMES):
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield repr(float(value))


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor, without its shape."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def file_digest(path: Path) -> str:
    """Of the tensors of a file, in the order of their names."""
    found = hashlib.sha256()
    for _, tensor in sorted(load_file(path).items()):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor_bytes(tensor))
    return found.hexdigest()


def digest(folder: Path) -> str:
    """Of all tensors that a run leaves and of all numbers of its records; names may change, bits may not."""
    found = hashlib.sha256()
    found.update(" ".join(sorted(map(file_digest, folder.rglob("*.safetensors")))).encode())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        found.update(" ".join(sorted(numbers(json.loads(line)))).encode())
    return found.hexdigest()[:24]


def resumed(folder: Path) -> str:
    """Of a run of three rounds, two of them after it was resumed."""
    fedlora.run(config(*settings("fedex-lora"), "rounds=1"), folder)
    fedlora.resume(folder, rounds=3)
    return digest(folder)


def over_flower(folder: Path, name: str) -> str:
    """Of a method's run over Flower messages in memory: the server's trees and the records of its rounds."""
    found = hashlib.sha256()
    for done in World(folder, *settings(name)).run():
        for _, layer in sorted(done.shared.items()):
            for _, tensor in sorted(layer.items()):
                found.update(tensor_bytes(tensor))
        found.update(" ".join(sorted(numbers(done.record))).encode())
    return found.hexdigest()[:24]


def jobs(folder: Path) -> Iterator[tuple[str, Callable[[Path], str]]]:
    """The name of each run, and what runs it in a folder and returns its hash."""

    def run(*overrides: str, table: dict[str, Any] = TABLE) -> Callable[[Path], str]:
        def into(place: Path) -> str:
            fedlora.run(config(*overrides, table=table), place)
            return digest(place)

        return into

    for task, table in tables(folder).items():
        for name in METHODS.names():
            yield f"{task}/{name}", run(*settings(name), table=table)
    for variant, (name, *overrides) in VARIANTS.items():
        yield f"{variant}/{name}", run(*settings(name), *overrides)
    yield "resumed/fedex-lora", resumed
    for name in ("fedsa-lora", "fedex-lora"):
        yield f"over Flower/{name}", lambda place, name=name: over_flower(place, name)


def hashes() -> dict[str, str]:
    """The hash of each run by its name."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        write_rows(folder)
        for number, (name, job) in enumerate(jobs(folder)):
            found[name] = job(folder / f"run{number}")
            print(f"{name} {found[name]}", flush=True)
    return found


def main() -> int:
    """1 where a hash differs from those of ``--against``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = hashes()
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    for name in sorted(found.keys() | before.keys()):
        if found.get(name) != before.get(name):
            print(f"{name}: {before.get(name)} before, {found.get(name)} now")
    return int(found != before)


if __name__ == "__main__":
    sys.exit(main())
