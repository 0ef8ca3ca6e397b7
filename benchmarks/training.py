"""Local training through fedlora against the same loop in plain PEFT and PyTorch: same batches, same settings."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from fedlora.runs.config import build
from fedlora.training.device import set_allocator
from fedlora.training.local import LocalTrainer, sample_batches

STEPS, PAIRS, BATCH = 30, 7, 16


def table(models: Path, data: Path) -> dict[str, Any]:
    """One client, float32, rank 8 on query and value: what both sides run."""
    return {
        "rounds": 1,
        "model": {"name": str(models / "minilm-l6-h384")},
        "task": {"name": "text-classification", "data": str(data / "banking77"), "test_rows": 100},
        "clients": {"count": 1},
        "adapter": {"name": "lora", "rank": 8, "alpha": 16},
        "training": {"local_steps": STEPS, "batch_size": BATCH, "precision": "float32", "learning_rate": 1e-3},
        "engine": {"device": "cpu", "threads": 1},
    }


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Samples a second of both, in turn, and the median of the pairs' ratios."""
    set_allocator("keep")
    config = build(table(models, data))
    f = config.federation()
    theirs = config.task.network(config.model.name, len(f.data.label_names), 0)
    peft = get_peft_model(
        theirs,
        LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]),
    )
    start = f.model.initial(0)
    trained = {part: rule.adapter.trainable for part, rule in f.rules.items()}
    ours_rate, their_rate = [], []
    for pair in range(PAIRS + 1):
        trainer = LocalTrainer(f.model, f.task, f.data.train, f.shards[0], f.training, f.turn(0, 0), 1)
        ours = _rate(lambda trainer=trainer: trainer.fit(start, trained, f.rules))
        plain = _rate(lambda: _plain(peft, f))
        if pair:  # the first pair warms up
            ours_rate.append(ours)
            their_rate.append(plain)
    return {
        "fedlora, samples a second": statistics.median(ours_rate),
        "plain PEFT, samples a second": statistics.median(their_rate),
        "fedlora / plain PEFT, median of pairs": statistics.median(a / b for a, b in zip(ours_rate, their_rate)),
        "pairs": [round(a / b, 3) for a, b in zip(ours_rate, their_rate)],
    }


def _rate(work) -> float:
    began = time.perf_counter()
    work()
    return STEPS * BATCH / (time.perf_counter() - began)


def _plain(network, f) -> None:
    """The loop as one writes it with PEFT, on the very batches that fedlora draws."""
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    stream = sample_batches(f.data.train, f.shards[0].train, f.training, 0)
    for _ in range(STEPS):
        batch = f.task.collate(f.data.train, next(stream))
        network(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
