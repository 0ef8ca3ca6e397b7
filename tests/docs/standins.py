"""What stands in for a reader's own things where a page's blocks are run, and the README's blocks that are not run."""

from pathlib import Path
from typing import Any

from fedlora.schema import dumps, read_table
from tests.fixtures.federation import TINY_VIT
from tests.fixtures.networks import write_decoder, write_encoder

QUICK = f"""\
rounds = 1
model = {{ name = "{TINY_VIT}" }}
task = {{ name = "image-classification", data = "digits", train_rows = 90, test_rows = 40 }}
clients = {{ count = 3, partition = {{ name = "dirichlet", alpha = 1.0 }} }}
adapter = {{ name = "lora", rank = 2, alpha = 4 }}
training = {{ local_steps = 1, batch_size = 8, learning_rate = 5e-3 }}
"""

# README.md bears no comments. How a block begins -> why it is not run:
README_NOT_RUN = {
    "src/fedlora/": "the tree of files, which is only read",
    "make demo": "they set up an environment of their own; CI's first steps are these commands",
    "fedlora chat": "needs a language model and benchmark data; tests/runs/test_chat.py and tests/code_eval/test_sandbox.py run these",
    "fedlora run mine.toml --engine": "starts Ray and processes; tests/flower runs each of these commands",
}
# How a block begins -> what has to be there before it.
README_BEFORE = {
    "fedlora aggregate": "fedlora export runs/mine-1 --all-clients --out parts\n"
    "mv parts/0 client-a && mv parts/1 client-b && mv parts/2 client-c",
}
# As the README's own, in small.
README_CONFIG = QUICK + 'method = { name = "fedsa-lora" }\n'
# No more rounds, steps and rows than these for a page's own configuration. The page keeps its numbers.
LARGEST: dict[str, Any] = {"rounds": 2, "training": {"local_steps": 2}, "task": {"train_rows": 120, "test_rows": 60}}


def small(table: dict[str, Any], own_network: bool = False) -> dict[str, Any]:
    """The table with each of these numbers lowered where it is larger, and a tiny network for the demo's."""
    found = _lowered(table, LARGEST)
    if found["task"].get("data") == "digits":
        found["task"] = {**LARGEST["task"], **found["task"]}
    if found["model"]["name"] == "demo-vit" and not own_network:
        found["model"] = {**found["model"], "name": str(TINY_VIT)}
    return found


def _lowered(table: dict[str, Any], largest: dict[str, Any]) -> dict[str, Any]:
    found = dict(table)
    for key in table.keys() & largest.keys():
        old, most = table[key], largest[key]
        found[key] = _lowered(old, most) if isinstance(most, dict) else min(old, most)
    return found


def example(root: Path, folder: Path, name: str) -> None:
    """One of the project's examples in small; on its own network, as wide as its adapter needs."""
    (folder / name).write_text(dumps(small(read_table(root / name), own_network=True)))


def quick(folder: Path, name: str) -> None:
    """A small configuration of the embedded demo under a page's name for it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(QUICK)


def encoder(folder: Path, name: str) -> None:
    """A text encoder that has learnt nothing, under a page's name for a pretrained one."""
    write_encoder(folder / name)


def decoder(folder: Path, name: str) -> None:
    """A causal language model that has learnt nothing, under a page's name for a pretrained one."""
    write_decoder(folder / name)
