"""What it costs the server to look at every upload, and to compare them all, beside combining them.

``python -m benchmarks.validation`` prints, for each method on the same uploads, processor seconds of ``server_turn``,
of the aggregation errors that a round measures by default, of reading the uploads as they come over a network, of
the screen, and of a robust aggregator's inner products. Aggregation as a user runs it is the first three together.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from fedlora.adapters import LoRA
from fedlora.engines.aggregation_error import aggregation_errors
from fedlora.files import Limits, decode_tree, encode_tree
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.rounds import Received, Rules, client_turn, server_turn
from fedlora.security.validation import UploadScreen, Validation
from fedlora.security.validation.update_norms import gram_matrix
from fedlora.types import Tree, Turn

SHAPES = {"12 of 384": (12, 384, 384), "24 of 768": (24, 768, 768), "4 of 4096": (4, 4096, 4096)}


class Walk:
    """Training that moves every leaf a little, each client's on its own."""

    def __init__(self, seed: int):
        self.draws = torch.Generator().manual_seed(seed)

    def gradient(self, start: Tree) -> Tree:
        return start

    def fit(self, start: Tree, trained: Any, rules: Rules) -> Tree:
        """A tenth of each leaf's own size, or of 0.02 where it is zero."""
        return {
            part: {leaf: self._near(x) if leaf in trained[part] else x for leaf, x in layer.items()}
            for part, layer in start.items()
        }

    def _near(self, x: torch.Tensor) -> torch.Tensor:
        size = float(x.square().mean().sqrt()) or 0.02
        return x + 0.1 * size * torch.randn(x.shape, generator=self.draws)


def uploads(
    method: Method, weights: int, m: int, n: int, K: int
) -> tuple[Rules, Tree, list[Received], dict[int, Tree]]:
    """What is served, ``K`` clients a little apart from it, as after a round of training, and what they keep."""
    rules = {f"w{i}": method for i in range(weights)}
    first: Tree = {part: method.adapter.init(m, n, i) for i, part in enumerate(rules)}
    every = dict.fromkeys(rules, method.adapter.trainable)
    shared = Walk(0).fit(first, every, rules)
    sent, kept = [], {}
    for k in range(K):
        turn = Turn(1, k, method.adapter.budget, k)
        tree, kept[k] = client_turn(rules, shared, {}, turn, Walk(k + 1))
        sent.append(Received(turn, 1, tree))
    return rules, shared, sent, kept


def seconds(works: Mapping[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Medians of so many runs after one that warms up: one after the other in turns, since a machine's pace changes."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            found[name].append(time.process_time() - began)
    return {name: median(each[1:]) for name, each in found.items()}


def looked_at(rules: Rules, shared: Tree, sent: Sequence[Received]) -> None:
    """All that validation does in a round."""
    screen = UploadScreen(Validation(), rules, shared, {})
    good = screen.compare([u for u in sent if screen.check(u) is not None], lambda upload: 1)
    screen.record_conduct()
    assert len(good) == len(sent), screen.rejected


def read(content: bytes) -> Tree:
    """An upload as it comes over a network, in memory of its own."""
    return decode_tree(content, Limits(2**31, 100_000, 2**24))


def measure(names: Sequence[str], shapes: Sequence[str], r: int, K: int, times: int) -> None:
    """Prints rows of figures, one a method and shape."""
    for shape in shapes:
        for name in names:
            kind = METHODS.load(name)
            round_of = uploads(kind(kind.adapters[0].like(LoRA(r, 16.0))), *SHAPES[shape], K)
            about = {"weights": shape, "rank": r, "clients": K, "method": name}
            print(json.dumps({**about, **costs(*round_of, times)}), flush=True)


def costs(rules: Rules, shared: Tree, sent: Sequence[Received], kept: dict[int, Tree], times: int) -> dict[str, float]:
    """Seconds of each, and the gate's share of combining alone, and of aggregation as a user runs it."""
    served, came = server_turn(rules, shared, sent), [encode_tree(u.tree) for u in sent]
    found = seconds(
        {
            "combine": lambda: server_turn(rules, shared, sent),
            "measure": lambda: aggregation_errors(rules, shared, sent, kept, served),
            "read": lambda: [read(content) for content in came],
            "validation": lambda: looked_at(rules, shared, sent),
            "inner products": lambda: gram_matrix(rules, shared, sent),
        },
        times,
    )
    whole = found["combine"] + found["measure"] + found["read"]
    return {
        **found,
        "share of combining": found["validation"] / found["combine"],
        "share of all": found["validation"] / whole,
    }


def main() -> None:
    """Prints a JSON line a row."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--methods", default="fedit,fedsa-lora,svd,flora,fedex-lora,ravan")
    options.add_argument("--shapes", default=",".join(SHAPES))
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--clients", type=int, default=20)
    options.add_argument("--times", type=int, default=9, help="runs of each, of which the median counts")
    asked = options.parse_args()
    torch.set_num_threads(1)
    measure(asked.methods.split(","), asked.shapes.split(","), asked.rank, asked.clients, asked.times)


if __name__ == "__main__":
    main()
