"""A party's side of secure aggregation: its upload leaves masked, and only the sum of all can be read.

What it sends is one vector: every leaf that anybody sends this round, zeros where it has none, and for each leaf a one
where it has it. So the server can take each leaf's mean over those who trained it, and cannot tell who that was.
"""

from collections.abc import Mapping, Sequence

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora.engines.flower.node import Node
from fedlora.engines.flower.records import HOLDS, METRICS, ORDER, order_of
from fedlora.rounds import Rules, received
from fedlora.secure import Client, Message, Session
from fedlora.state import SEPARATOR, write
from fedlora.types import Tree, Turn, Work

PHASE, SESSION, TOLD, SAID, LAYOUT = "phase", "session", "told", "said", "layout"

Layout = Mapping[str, tuple[int, ...]]  # ``part/leaf`` -> shape, in the vector's order


def answer(node: Node, content: RecordDict) -> RecordDict:
    """One of the four messages of a session. The party's keys lie on its disk between them, and no longer."""
    if content[ORDER]["client"] != node.client:
        raise ValueError(f"a message for client {content[ORDER]['client']} came to client {node.client}.")
    phase, found, place = content[PHASE][PHASE], RecordDict(), node.store.secret(node.client)
    told = Message(**content[TOLD]) if TOLD in content else None
    if phase == "advertise":
        client = Client(Session.of(content[SESSION]), node.client)
        said = client.advertise()
    else:
        client = Client.from_bytes(place.read_bytes())
        given = (_turn(node, content, found),) if phase == "masked" else ()
        said = getattr(client, str(phase))(told, *given)
    write(place, client.to_bytes())  # before the message leaves: a client set back could be made to answer twice
    if phase == "unmask":
        place.unlink()
    found[SAID] = ConfigRecord(said.record())
    return found


def _turn(node: Node, content: RecordDict, found: RecordDict) -> Tensor:
    """Trains, notes the figures, and returns the vector to be masked."""
    order, leaves, folds = order_of(content)
    done = node.train(order, leaves, folds)
    found[METRICS], found[HOLDS] = MetricRecord(done.metrics), ConfigRecord({HOLDS: done.holds})
    names, ranks = content[LAYOUT]["names"], content[LAYOUT]["ranks"]
    sizes = iter(content[LAYOUT]["sizes"])
    return vector({name: tuple(next(sizes) for _ in range(rank)) for name, rank in zip(names, ranks)}, done.sent or {})


def layout_record(layout: Layout) -> ConfigRecord:
    """The layout as lists."""
    shapes = list(layout.values())
    sizes = [size for shape in shapes for size in shape]
    return ConfigRecord({"names": list(layout), "ranks": [len(shape) for shape in shapes], "sizes": sizes})


def vector(layout: Layout, sent: Tree) -> Tensor:
    """``(d,)`` float32: every leaf's numbers in the layout's order, then a one for each leaf that was sent."""
    own = {f"{part}{SEPARATOR}{leaf}": x.float() for part, layer in sent.items() for leaf, x in layer.items()}
    strange = [name for name, x in own.items() if layout.get(name) != tuple(x.shape)]
    if strange:
        raise ValueError(f"this party would send {strange[0]!r}, which is not in the round's layout.")
    values = [
        own[name].reshape(-1) if name in own else torch.zeros(shape).reshape(-1) for name, shape in layout.items()
    ]
    return torch.cat([*(x.cpu() for x in values), torch.tensor([float(name in own) for name in layout])])


def size(layout: Layout) -> int:
    """``d``: how long the vector is."""
    return sum(torch.Size(shape).numel() + 1 for shape in layout.values())


def means(layout: Layout, mean: Tensor, least: float) -> Tree:
    """Each leaf's mean over those who sent it, of the mean of all vectors; without leaves that nobody sent.

    ``least`` is the smallest share that a client can have in that mean.
    """
    there = mean[mean.numel() - len(layout) :]
    tree: dict[str, dict[str, Tensor]] = {}
    at = 0
    for (name, shape), present in zip(layout.items(), there.tolist()):
        numbers = torch.Size(shape).numel()
        part, _, leaf = name.rpartition(SEPARATOR)
        layer = tree.setdefault(part, {})
        if present > least / 2:
            everyone = abs(present - 1) < 1e-6
            layer[leaf] = mean[at : at + numbers].reshape(shape) / (1.0 if everyone else present)
        at += numbers
    return tree


def layout_of(rules: Rules, shared: Tree, turns: Sequence[Turn]) -> Layout:
    """Every leaf that a client of these turns may send: what the method sends of a start that nobody has trained."""
    found: dict[str, tuple[int, ...]] = {}
    for turn in turns:
        start = received(rules, shared, {}, turn)
        for part, rule in rules.items():
            sent = rule.send(Work(start[part], start[part], _trained(rule, start[part], turn)), turn)
            found |= {f"{part}{SEPARATOR}{leaf}": tuple(x.shape) for leaf, x in sent.items()}
    return found


class _GradientError(Exception):
    """The choice of what to train goes by the client's own rows: any leaf may come."""


def _trained(rule, start, turn: Turn) -> frozenset[str]:
    def unknown():
        raise _GradientError

    try:
        return rule.trains(start, turn, unknown)
    except _GradientError:
        return rule.adapter.trainable
