"""What it costs the server to look at every upload, and to compare them all, beside combining them.

``python -m benchmarks.hygiene`` prints, for each method on the same uploads, processor seconds of ``server_turn``, of
the aggregation errors that a round measures unless told not to, of the gate, and of a robust rule's inner products.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from fedlora import methods
from fedlora.adapters import LoRA
from fedlora.hygiene import Gate, Hygiene
from fedlora.measures import errors
from fedlora.method import Method
from fedlora.rounds import Received, server_turn
from fedlora.types import Turn
from fedlora.updates import gram

SHAPES = {"12 of 384": (12, 384, 384), "24 of 768": (24, 768, 768), "4 of 4096": (4, 4096, 4096)}


def uploads(weights: int, m: int, n: int, r: int, K: int) -> tuple[dict[str, Any], list[Received]]:
    """What is served, and ``K`` clients a little apart from it, as after a round of training."""
    g = torch.Generator().manual_seed(0)
    shared = {
        f"w{i}": {"A": torch.randn(r, n, generator=g) * n**-0.5, "B": torch.randn(m, r, generator=g) * 0.02}
        for i in range(weights)
    }

    def near(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * x.std() * torch.randn(x.shape, generator=g)

    return shared, [
        Received(Turn(1, k, r, k), 1, {p: {leaf: near(x) for leaf, x in layer.items()} for p, layer in shared.items()})
        for k in range(K)
    ]


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Median of some runs, after one that warms up."""
    work()
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return median(found)


def looked_at(rules: Any, shared: Any, sent: Sequence[Received]) -> None:
    """All that hygiene does in a round."""
    gate = Gate(Hygiene(), rules, shared, {})
    good = gate.judged([u for u in sent if gate.arrived(u) is not None], lambda upload: 1)
    gate.settle()
    assert len(good) == len(sent), gate.bad


def measure(names: Sequence[str], shapes: Sequence[str], r: int, K: int) -> list[dict[str, Any]]:
    """Rows of figures, one a method and shape."""
    found = []
    for shape in shapes:
        shared, sent = uploads(*SHAPES[shape], r, K)
        for name in names:
            about = {"weights": shape, "rank": r, "clients": K, "method": name}
            found.append({**about, **costs(methods.load(name)(LoRA(r, 16.0)), shared, sent)})
            print(json.dumps(found[-1]), flush=True)
    return found


def costs(method: Method, shared: Any, sent: Sequence[Received]) -> dict[str, float]:
    """Seconds of each, and the gate's share of combining, and of combining and measuring."""
    rules = dict.fromkeys(shared, method)
    served = server_turn(rules, shared, sent)
    combine = seconds(lambda: server_turn(rules, shared, sent))
    measure = seconds(lambda: errors(rules, shared, sent, {}, served))
    gate = seconds(lambda: looked_at(rules, shared, sent))
    return {
        "combine": combine,
        "measure": measure,
        "hygiene": gate,
        "share of combining": gate / combine,
        "share of both": gate / (combine + measure),
        "inner products": seconds(lambda: gram(rules, shared, sent), 2),
    }


def main() -> None:
    """Prints a JSON line a row."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--methods", default="fedit,fedex-lora,flexlora,svd,flora-na")
    options.add_argument("--shapes", default=",".join(SHAPES))
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--clients", type=int, default=20)
    asked = options.parse_args()
    torch.set_num_threads(1)
    measure(asked.methods.split(","), asked.shapes.split(","), asked.rank, asked.clients)


if __name__ == "__main__":
    main()
