"""The hashes that show whether a change leaves results as they are: equal for equal runs, and no others."""

import json

import torch
from safetensors.torch import load_file, save_file
from scripts import run_hashes

from fedlora.methods import METHODS


def test_hashes_are_of_the_bits_of_a_run(tmp_path):
    run_hashes.write_models(tmp_path)
    run_hashes.write_rows(tmp_path)
    jobs = dict(run_hashes.jobs(tmp_path))
    assert {f"{task}/{name}" for task in ("images", "text", "causal-lm") for name in METHODS.names()} <= jobs.keys()
    for name in ("images/fedsa-lora", "text/fedex-lora", "causal-lm/flora-na", "client privacy/ffa-lora"):
        first, second = (jobs[name](tmp_path / f"{name} {k}".replace("/", " ")) for k in range(2))
        assert first == second, name

    folder = tmp_path / "images fedsa-lora 0"
    before, metrics, shared = run_hashes.digest(folder), folder / "metrics.jsonl", folder / "shared.safetensors"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("\n".join(json.dumps({**record, "seconds": {"total": 99.0}}) for record in records))
    assert run_hashes.digest(folder) == before, "times are not part of it"
    leaves = load_file(shared)
    name = next(iter(leaves))
    leaves[name].view(torch.int32).reshape(-1)[0] ^= 1  # the last bit of one number
    save_file(leaves, shared)
    assert run_hashes.digest(folder) != before
