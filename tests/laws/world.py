"""A federation of random tensors: real hooks, real turns, no network and no training."""

import itertools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from fedlora import methods
from fedlora.adapters import Dense, DualLoRA, Heads, LoRA, LoRASB, VeRA
from fedlora.methods._base import Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.local import Local
from fedlora.rounds import Received, client_turn, received, server_turn
from fedlora.seeds import derived
from fedlora.types import Tree, Turn

SHAPES = {"first": (7, 5), "second": (6, 9), "third": (7, 5)}  # non-square, and two alike: transposes cannot hide
HEAD = "head"
ADAPTERS = {
    LoRA: [LoRA(2, 3.0), LoRA(3, 5.0, use_rslora=True)],
    VeRA: [VeRA(4)],
    LoRASB: [LoRASB(3), LoRASB(None, 1)],
    DualLoRA: [DualLoRA(2, 3.0), DualLoRA(3, 5.0, use_rslora=True)],
    Heads: [Heads(2, 2, basis=b) for b in ("gram_schmidt", "normal", "constant", "shared_subspace")],
}
OPTIONS = {bool: (True, False), int | None: (None, 1), int: (0, 2)}  # what is tried of an option of these types
Weights = Mapping[str, Tensor]


def variants(kind: type[Method]) -> Iterator[Method]:
    """Every adapter the class claims, and every value of its options, one option at a time."""
    for adapter in itertools.chain.from_iterable(ADAPTERS[a] for a in kind.adapters):
        yield kind(adapter=adapter)
    hints = typing.get_type_hints(kind)
    start = kind(adapter=ADAPTERS[kind.adapters[0]][0])
    for f in fields(kind):
        values = typing.get_args(hints[f.name]) if typing.get_origin(hints[f.name]) is typing.Literal else ()
        values = OPTIONS.get(hints[f.name], values)
        for value in values:
            if value != getattr(start, f.name):
                yield replace(start, **{f.name: value})


def everything() -> list[Method]:
    """All methods that there are, in all their variants, but those that imitate published code as it is."""
    found = [v for name in methods.names() for v in variants(methods.load(name))]
    return [method for method in found if not method.imitation]


def label(method: Method) -> str:
    adapter = ",".join(f"{f.name}={getattr(method.adapter, f.name)}" for f in fields(method.adapter))
    rest = ",".join(f"{f.name}={getattr(method, f.name)}" for f in fields(method) if f.name != "adapter")
    return f"{type(method).__name__}[{type(method.adapter).__name__}({adapter}),{rest}]"


@dataclass
class Nudge:
    """Instead of training: moves every trained leaf by seeded noise. ``size=0`` moves nothing."""

    seed: int
    size: float = 0.3
    end: Tree = field(default_factory=dict)

    def gradient(self, start: Tree) -> Tree:
        return self._moved(start, None, "gradient")

    def fit(self, start, trained, rules) -> Tree:
        self.end = self._moved(start, trained, "fit")
        return self.end

    def _moved(self, start, trained, what):
        found = {}
        for part, layer in start.items():
            found[part] = {}
            for leaf, x in layer.items():
                draws = torch.Generator().manual_seed(derived(self.seed, what, part, leaf))
                noise = torch.randn(x.shape, generator=draws, dtype=x.dtype)
                found[part][leaf] = x + self.size * noise if trained is None or leaf in trained[part] else x
        return found


@dataclass
class World:
    """Parties that hold a base, a shared tree and what each keeps."""

    method: Method
    examples: tuple[int, ...] = (5, 2, 9)
    same_seed: bool = False  # one turn seed for all clients
    round: int = 0

    def __post_init__(self):
        adapter = self.method.adapter
        self.rules = dict.fromkeys(SHAPES, self.method)
        self.rules[HEAD] = (FedIT if self.method.shares_head else Local)(Dense(), self.method.weighting)
        draws = torch.Generator().manual_seed(7)
        self.base = {p: torch.randn(m, n, generator=draws, dtype=torch.float64) for p, (m, n) in SHAPES.items()}
        self.shared = {
            p: {leaf: x.double() for leaf, x in adapter.init(m, n, derived(3, p)).items()}
            for p, (m, n) in SHAPES.items()
        }
        self.shared[HEAD] = {
            "weight": torch.randn(3, 4, generator=draws).double(), "bias": torch.randn(3, generator=draws).double()
        }  # fmt: skip
        self.kept: dict[int, Tree] = {}
        self.sent: dict[int, Tree] = {}

    def turn(self, client: int) -> Turn:
        seed = derived(1, self.round) if self.same_seed else derived(1, self.round, client)
        return Turn(self.round, client, self.method.adapter.budget, seed)

    def step(self, trainers: Mapping[int, Nudge]) -> dict[int, Weights]:
        """One round of these clients; returns the weights each trained to."""
        trained = {}
        uploads = []
        for client, trainer in trainers.items():
            turn = self.turn(client)
            sent, kept = client_turn(self.rules, self.shared, self.kept.get(client, {}), turn, trainer)
            self.kept[client], self.sent[client] = kept, sent
            trained[client] = self.weights(trainer.end)
            uploads.append(Received(turn, self.examples[client], sent))
        served = server_turn(self.rules, self.shared, uploads)
        self.shared = served.shared
        for part, folds in served.folds.items():
            self.base[part] = self.base[part] + sum(f.dense() for f in folds)
        self.round += 1
        return trained

    def follow(self, other: "World", names: Mapping[int, int]) -> None:
        """Takes over another world's state; client k here is client ``names[k]`` there.

        The laws speak of weights. Factors of one weight may differ by a map between them (an SVD's signs), and what
        the same noise on them makes in the next round differs with it.
        """
        self.base, self.shared, self.round = dict(other.base), other.shared, other.round
        self.kept = {client: other.kept[name] for client, name in names.items() if name in other.kept}

    def weights(self, tree: Tree) -> Weights:
        """The model that a tree stands for, written out."""
        found = {p: self.base[p] + self.method.adapter.delta(tree[p]).dense() for p in SHAPES}
        return found | {f"{HEAD}.{leaf}": x for leaf, x in tree[HEAD].items()}

    def held(self, client: int) -> Weights:
        """What a client would be evaluated with, or start from, now."""
        return self.weights(received(self.rules, self.shared, self.kept.get(client, {}), self.turn(client)))


def distance(a: Weights, b: Weights) -> float:
    """The largest difference anywhere, relative to the weights' size."""
    return max(float((a[p] - b[p]).abs().max() / b[p].abs().max().clamp_min(1e-12)) for p in b)
