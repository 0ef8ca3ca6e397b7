"""`fedlora aggregate` as a whole command on finished adapters: time, peak memory, and what PEFT's own merging gives."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedlora.training.peft_folder import save_folder

WATCHED = """
import sys
from benchmarks import peak
from fedlora.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print(peak.megabytes(), file=sys.stderr)
"""
SIDE = 4096  # of a 7B Llama's query and value projections
LAYERS = 32


def adapters(folder: Path, count: int, layers: int, rank: int = 16) -> list[str]:
    """PEFT folders of random adapters a little apart from each other, as clients' are after a round."""
    g = torch.Generator().manual_seed(0)
    parts = [f"model.layers.{i}.self_attn.{name}" for i in range(layers) for name in ("q_proj", "v_proj")][: 2 * layers]
    parts = parts if layers > 0 else ["model.layers.0.self_attn.q_proj"]
    like = {
        "peft_type": "LORA",
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "llama",
        "bias": "none",
    }
    common = {p: (torch.randn(rank, SIDE, generator=g) / 64, torch.randn(SIDE, rank, generator=g) / 50) for p in parts}
    found = []
    for k in range(count):
        noise = (torch.randn(rank, SIDE, generator=g) / 200, torch.randn(SIDE, rank, generator=g) / 100)
        layers_of = {p: {"A": A + noise[0], "B": B + noise[1]} for p, (A, B) in common.items()}
        save_folder(folder / str(k), like, layers_of, dict.fromkeys(parts, 32.0))
        found.append(str(folder / str(k)))
    return found


def command(folders: list[str], out: Path, *options: str) -> dict[str, float]:
    """Seconds and peak resident megabytes of one `fedlora aggregate` in a process of its own."""
    began = time.perf_counter()
    asked = ["aggregate", *folders, "--out", str(out), "--json", *options]
    done = subprocess.run([sys.executable, "-c", WATCHED, *asked], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    found = {"seconds": time.perf_counter() - began, "peak MB": float(done.stderr.split()[-1])}
    return {**found, "error": report["error"], "error of the averaged factors": report["error_fedit"]}


def against_peft() -> dict[str, float]:
    """Relative error against the exact mean update: PEFT's `add_weighted_adapter`, and `fedlora aggregate --exact`."""
    cases: dict[str, list[dict[str, Any]]] = {
        "rsLoRA, rank 8": [{"r": 8, "use_rslora": True}] * 3,
        "ranks 4, 8 and 16": [{"r": 4}, {"r": 8}, {"r": 16}],
        "rsLoRA, ranks 4, 8 and 16": [{"r": r, "use_rslora": True} for r in (4, 8, 16)],
    }
    found = {}
    for label, settings in cases.items():
        base = nn.Sequential(nn.Linear(256, 192, bias=False))
        configs = [LoraConfig(target_modules=["0"], lora_alpha=16, **s) for s in settings]
        model = get_peft_model(base, configs[0], "a0")
        for i, config in enumerate(configs[1:], 1):
            model.add_adapter(f"a{i}", config)
        names = [f"a{i}" for i in range(3)]
        layer = model.base_model.model[0]
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in names:
                for side in (layer.lora_A[name].weight, layer.lora_B[name].weight):
                    side.copy_(torch.randn(side.shape, generator=g))
        exact = sum(layer.get_delta_weight(name).detach() for name in names) / 3
        for kind in ("linear", "cat", "svd"):
            try:
                model.add_weighted_adapter(names, [1 / 3] * 3, kind, combination_type=kind, svd_rank=64)
                away = float((layer.get_delta_weight(kind).detach() - exact).norm() / exact.norm())
            except ValueError as error:
                found[f"{label}: PEFT {kind}"] = f"refused: {error}"
                continue
            found[f"{label}: PEFT {kind}"] = away
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                model.save_pretrained(folder, selected_adapters=[name])
            mine = command([f"{folder}/{name}" for name in names], Path(folder) / "out", "--exact")
        found[f"{label}: fedlora aggregate --exact"] = mine["error"]
    return found


def measure(models: Path, data: Path) -> dict[str, Any]:
    """32 adapters of rank 16 on 64 weights of a 7B Llama; 100 adapters against 1,000 of one weight; PEFT's merging."""
    found: dict[str, Any] = {"error against the exact mean": against_peft()}
    with tempfile.TemporaryDirectory() as place:
        folders = adapters(Path(place) / "in", 32, LAYERS)
        for name in ("fedit", "svd", "flora-na"):
            found[f"32 adapters, 64 weights of 4096 x 4096: {name}"] = command(
                folders, Path(place) / name, "--method", name
            )
    with tempfile.TemporaryDirectory() as place:
        folders = adapters(Path(place) / "in", 1000, 0)
        extra = {"fedex-lora": ["-o", "residual_rank=16", "--residual", f"{place}/rest"]}
        for name in ("fedit", "svd", "flexlora", "fedex-lora", "flora-na"):
            for count in (100, 1000):
                more = [x.replace("rest", f"rest{count}") for x in extra.get(name, [])]
                out = Path(place) / f"{name}-{count}"
                found[f"{count} adapters, one weight: {name}"] = command(folders[:count], out, "--method", name, *more)
    return found
