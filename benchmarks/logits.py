"""Memory and time of a language model's loss: all logits at once, against chunks of the learnt ones.

A model of one layer and random weights with a vocabulary of 262,144; half of the tokens are learnt. Each point is a
process of its own: the peak is above the process's memory before the first step, with the weights loaded.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import peak
from fedlora.adapters import LoRA
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.networks.next_token_loss import AllLogits, prepare_loss
from fedlora.training.model import Model

WORDS, HIDDEN = 262_144, 64
ROWS = {"training step": 4, "evaluation": 24}
TOKENS, REPEATS = 256, 3
WAYS = ("plain", "chunks")


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Peak and median seconds of one training step and of one evaluation, each way in turn."""
    return {way: _child(way) for way in WAYS}


def build_network(hidden: int) -> nn.Module:
    """Return a Llama of one layer with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "intermediate_size": 2 * hidden, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, hidden_size=hidden, tie_word_embeddings=True, **heads))


def draw_batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return rows of random tokens, the second half of each learnt."""
    ids = torch.randint(WORDS, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measure_peaks(
    way: str,
    network: nn.Module,
    step: dict[str, torch.Tensor],
    evaluation: dict[str, torch.Tensor] | None = None,
    repeats: int = REPEATS,
) -> dict[str, dict[str, float]]:
    """Return the peak above the weights and the median seconds of an evaluation and of a training step."""
    task = CausalLM("unread")
    prepare_loss(network, task.probe(network))
    if way == "plain":
        network.next_token_loss = AllLogits()  # type: ignore[assignment]
    network.put_on_top = []  # as of a network that a task loads: nothing on top is trained
    model = Model.attach(network, LoRA(rank=8, alpha=16.0), ["q_proj", "v_proj"])
    model.reset(0)
    small = {name: x[:1, -2:] for name, x in step.items()}

    def score(batch: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            task.outputs(network, batch)

    def train(batch: dict[str, torch.Tensor]) -> None:
        model.gradient(lambda network: task.loss(network, batch))

    return {
        name: _measure(run, small, batch, repeats)
        for name, run, batch in (("evaluation", score, evaluation or step), ("step", train, step))
    }


def _measure(run: Callable[[Any], None], small: Any, batch: Any, repeats: int) -> dict[str, float]:
    run(small)  # loads the kernels
    _reset_peak()
    before = peak.megabytes()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - began)
    return {"MiB": round(peak.megabytes() - before), "seconds": round(statistics.median(seconds), 2)}


def _reset_peak() -> None:
    """Begin the kernel's count of peak memory again at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def _child(way: str) -> dict[str, Any]:
    out = subprocess.run([sys.executable, "-m", "benchmarks.logits", way], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


if __name__ == "__main__":
    batches = [draw_batch(rows, TOKENS) for rows in ROWS.values()]
    print(json.dumps(measure_peaks(sys.argv[1], build_network(HIDDEN), *batches)))
