"""Combining factors on the server: every method against reading the bytes once, and against the dense way.

Both alternatives run in the same process on the same tensors, so only the ratios mean something.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora.adapters import LoRA
from fedlora.methods import METHODS, merging_methods
from fedlora.methods._base import Method
from fedlora.training.device import set_allocator
from fedlora.types import Layer, Turn, Upload, Work

LONG = 2.0  # seconds: not repeated
ADAM_STEPS = 200  # of the published gradient-descent way; timed on fewer and scaled
SHAPES = {"384": (384, 384), "1024": (1024, 1024), "4096": (4096, 4096), "4096x11008": (4096, 11008)}


def cohort(m: int, n: int, r: int, K: int) -> list[Upload]:
    """``K`` clients a little apart from a common start, as after a round of training."""
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(r, n, generator=g) * n**-0.5, torch.randn(m, r, generator=g) * 0.02
    return [
        Upload(
            Turn(1, k, r),
            1 / K,
            {"A": A + 0.3 * torch.randn(r, n, generator=g) * n**-0.5, "B": B + 0.01 * torch.randn(m, r, generator=g)},
        )
        for k in range(K)
    ]


def seconds(work: Callable[[], Any], least: float = 0.3, most: int = 7) -> float:
    """Median of repeated runs after one that warms up; of a long one, that one itself."""
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < 4 or (time.perf_counter() - began < least and len(found) <= most):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
        if found[-1] > LONG:
            return found[-1]
    return statistics.median(found[1:])


def read_once(uploads: Sequence[Upload]) -> None:
    """Every uploaded number once: the floor."""
    for upload in uploads:
        for x in upload.layer.values():
            x.sum()


def combined(method: Method, start: Layer, uploads: Sequence[Upload]) -> Any:
    """One weight through the method; what its clients do before sending is done for the cohort at once."""
    if "send" in vars(type(method)) and len({u.layer["A"].shape for u in uploads}) == 1:
        ends = {leaf: torch.stack([u.layer[leaf] for u in uploads]) for leaf in "AB"}
        sent = method.send(Work(start, ends, frozenset("AB")), uploads[0].turn)
        uploads = [u._replace(layer={leaf: x[k] for leaf, x in sent.items()}) for k, u in enumerate(uploads)]
    return method.combine_all({"w": start}, {"w": uploads})


def one(m: int, n: int, r: int, K: int, names: Sequence[str]) -> dict[str, float]:
    """Multiples of reading the bytes, a method each."""
    uploads, adapter = cohort(m, n, r, K), LoRA(r, 2.0 * r)
    start = uploads[0].layer
    floor = seconds(lambda: read_once(uploads))
    found = {"floor_ms": 1e3 * floor}
    for name in names:
        method = replace(METHODS.load(name)(), adapter=adapter)
        found[name] = seconds(lambda method=method: combined(method, start, uploads)) / floor
    found["svd, one sweep"] = seconds(lambda: combined(METHODS.load("svd")(adapter, sweeps=1), start, uploads)) / floor
    return found


def whole_model(names: Sequence[str], weights: int = 16) -> dict[str, float]:
    """Multiples of reading the bytes over many weights of 4096 x 4096, rank 16, 100 clients: no cache holds them.

    A 7B model has 64 such weights; they are combined one after the other, so 16 tell as much.
    """
    cohorts = [cohort(4096, 4096, 16, 100) for _ in range(weights)]
    floor = seconds(lambda: [read_once(uploads) for uploads in cohorts])
    found = {"floor_ms": 1e3 * floor, "GB a second": weights * 100 * 8192 * 16 * 4 / floor / 1e9}
    for name in names:
        method = replace(METHODS.load(name)(), adapter=LoRA(16, 32.0))
        took = seconds(lambda method=method: [combined(method, uploads[0].layer, uploads) for uploads in cohorts])
        found[name] = took / floor
    return found


def dense(m: int, n: int, r: int, K: int) -> dict[str, float]:
    """How much faster than the dense ways of published code, on the same uploads."""
    uploads, adapter = cohort(m, n, r, K), LoRA(r, 2.0 * r)
    start = uploads[0].layer

    def mean_product():
        return sum(u.weight * (u.layer["B"] @ u.layer["A"]) for u in uploads)

    target = mean_product()

    def adam(steps=2):
        p, q = (torch.ones(K, requires_grad=True) for _ in "pq")
        optimizer = torch.optim.AdamW([p, q], lr=1e-2, weight_decay=0.0)
        As, Bs = (torch.stack([u.layer[leaf] for u in uploads]) for leaf in "AB")
        for _ in range(steps):
            optimizer.zero_grad()
            product = torch.einsum("k,kmr->mr", p, Bs) @ torch.einsum("k,krn->rn", q, As)
            ((product - target).square().sum() / target.square().sum()).backward()
            optimizer.step()

    ours = {name: replace(METHODS.load(name)(), adapter=adapter) for name in ("flora-na", "flexlora", "fedex-lora")}
    mine = {name: seconds(lambda method=method: combined(method, start, uploads)) for name, method in ours.items()}
    began = time.perf_counter()
    torch.linalg.svd(mean_product(), full_matrices=False)
    svd = time.perf_counter() - began
    means = {leaf: sum(u.weight * u.layer[leaf] for u in uploads) for leaf in "AB"}
    return {
        "flora-na against 200 Adam steps on dense products": seconds(adam, 0) / 2 * ADAM_STEPS / mine["flora-na"],
        "flexlora against the dense SVD": svd / mine["flexlora"],
        "fedex-lora against the dense residual": seconds(lambda: mean_product() - means["B"] @ means["A"], 0)
        / mine["fedex-lora"],
    }


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Shapes, ranks and clients; the largest cases at the paper's rank only."""
    names = list(merging_methods())
    set_allocator("keep")  # as fedlora's own commands do
    found: dict[str, Any] = {"multiples of reading the bytes": {}}
    for label, (m, n) in SHAPES.items():
        for r in (8, 16, 64):
            for K in (10, 100, 1000):
                if K * r * (m + n) > 4e8:  # 1.6 GB of uploads for one weight
                    continue
                few = [name for name in names if K < 1000 or name != "fedex-lora"]
                found["multiples of reading the bytes"][f"{label}, rank {r}, {K} clients"] = one(m, n, r, K, few)
    found["16 weights of 4096, rank 16, 100 clients, multiples"] = whole_model(names)
    found["times faster than the dense way (4096, rank 16, 10 clients)"] = dense(4096, 4096, 16, 10)
    return found
