"""What ``fedlora.federate`` costs beside ``Trainer.train()``: processor time of equal steps, and memory of clients."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import peak

MODEL, ROWS, LENGTH, STEPS, ROUNDS, REPEATS = "minilm-l3-h384-v8k", 320, 32, 10, 2, 3


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Processor seconds of federate and of plain ``train()`` calls in turn; peak memory of 20 clients and of 2."""
    found = _ask(models, "time")
    peaks = {count: _ask(models, str(count))["peak_mb"] for count in (2, 20)}
    return {**found, "MB at 2 clients": peaks[2], "MB at 20 clients": peaks[20], "ratio of MB": peaks[20] / peaks[2]}


def _ask(models: Path, question: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.federate", str(models / MODEL), question]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def _make(model: str, folder: str):
    """Return the function of a user: base by its name, PEFT's LoRA, a Trainer."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    def make(client):
        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=4)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
        ids = torch.randint(5, 8000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(client.number))
        rows = [{"input_ids": x, "labels": x[0] % 4} for x in ids]
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=16, learning_rate=1e-3, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        return Trainer(peft.get_peft_model(network, config), args, train_dataset=rows)

    return make


def _compare_time(model: str) -> dict[str, Any]:
    """Return the processor seconds of two rounds of two clients, and of as many ``train()`` calls, in pairs."""
    import fedlora
    from fedlora.engines.trainers import ClientInfo

    pairs = []
    with TemporaryDirectory() as folder:
        make = _make(model, folder)
        for _ in range(REPEATS + 1):  # the first pair warms up
            began = time.process_time()
            fedlora.federate(make, 2, "fedit", ROUNDS)
            middle = time.process_time()
            first = make(ClientInfo(0, 2, 0))
            for trainer in (first, make(ClientInfo(1, 2, 0))):
                for _ in range(ROUNDS):
                    trainer.train()
            pairs.append((middle - began, time.process_time() - middle))
    pairs = pairs[1:]
    ratios = sorted(ours / plain for ours, plain in pairs)
    return {
        "federate, s": median(ours for ours, _ in pairs), "train(), s": median(plain for _, plain in pairs),
        "federate / train()": median(ratios), "lowest": ratios[0], "highest": ratios[-1],
    }  # fmt: skip


def _run_clients(model: str, count: int) -> dict[str, Any]:
    import fedlora

    with TemporaryDirectory() as folder:
        fedlora.federate(_make(model, folder), count, "fedsa-lora", 2)
    return {"peak_mb": peak.megabytes()}


if __name__ == "__main__":
    place, asked = sys.argv[1:]
    print(json.dumps(_compare_time(place) if asked == "time" else _run_clients(place, int(asked))))
