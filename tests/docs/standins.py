"""What stands in for a reader's own things where a page's blocks are run, and the README's blocks that are not run."""

from pathlib import Path

QUICK = """\
rounds = 2
model = { name = "demo-vit" }
task = { name = "image-classification", data = "digits", train_rows = 150, test_rows = 60 }
clients = { count = 3, split = { name = "dirichlet", alpha = 1.0 } }
adapter = { name = "lora", rank = 2, alpha = 4 }
training = { local_steps = 2, batch_size = 8, learning_rate = 5e-3 }
"""

# README.md bears no comments: (how a block begins, why it is not run).
README_NOT_RUN = (
    ("make demo", "they set up an environment of their own; CI's first steps are these commands"),
    (
        "fedlora chat",
        "needs a causal language model and benchmark data; tests/test_chat.py and tests/test_sandbox.py run these",
    ),
    (
        "fedlora run mine.toml --engine flower-simulation",
        "starts Ray and processes; tests/flower runs each of these commands",
    ),
)
README_FIRST = (
    "fedlora run mine.toml --out runs/mine-1 -o method.name=fedsa-lora",
    "for k in a b c; do fedlora export runs/mine-1 --out client-$k; done",
    "fedlora run mine.toml --out runs/whole && mv runs/mine-1 runs/own && cp -r runs/whole runs/mine-1 && rm -rf runs/whole",
)


def quick(folder: Path, name: str) -> None:
    """A small configuration of the embedded demo under a page's name for it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(QUICK)
