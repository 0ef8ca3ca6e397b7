"""Trees, orders and answers as Flower's records, and back.

A tree is sent as one array of bytes in safetensors form: any dtype (Flower's own arrays refuse bfloat16), no pickle,
and one object on the wire instead of two for each leaf. With secure aggregation an upload is one vector instead; its
layout says which leaves it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError
from torch import Tensor

from fedlora.engines.base_updates import BaseUpdate, base_update_from_tree, base_update_to_tree
from fedlora.engines.comm.channel import Delivery
from fedlora.engines.loop import Round
from fedlora.files import SEPARATOR, Limits, RefusedHeaderError, decode_tree, encode_tree, flatten, unflatten
from fedlora.rounds import Rules
from fedlora.security.validation.expected import build_upload_spec
from fedlora.types import Tree, Turn

MESSAGE = Limits(2**31, 100_000, 2**24)  # of what the server sends; uploads have a limit of their own
STYPE = "safetensors"  # how an array of ours is written, where Flower would write npy
LEAVES, BASE_UPDATES, ORDER, METRICS, HOLDS = "leaves", "base_updates", "order", "metrics", "holds"

Layout = Mapping[str, tuple[int, ...]]  # ``part/leaf`` -> shape


@dataclass(frozen=True)
class Order:
    """What a message asks of a client, beside the leaves and base updates that it brings."""

    run: str  # the run's own token: a resumed run keeps it, another run never has it
    round: int  # from 0
    client: int
    full: bool  # the leaves are those that differ from what the seed gives, not from those that the client holds
    first: int  # number of the first fold that comes along
    after: int  # base updates that the client holds then
    before: str  # the name of the base with the base updates before ``first`` in it
    base: str  # and with those before ``after``
    holds: str  # digest of the leaves that the client holds then
    counted: int = -1  # the last round that this client's upload went into


class SentOrder(NamedTuple):
    """An order that went to a client, and the delivery that it brought along."""

    node: int
    client: int
    order: Order
    delivery: Delivery | None


class UnreadableError(ValueError):
    """A record that is not what was agreed."""


def tree_to_record(tree: Tree) -> ArrayRecord:
    """One array of bytes."""
    content = encode_tree(tree)
    return ArrayRecord({LEAVES: Array(dtype="uint8", shape=(len(content),), stype=STYPE, data=content)})


def record_to_tree(record: ArrayRecord, limits: Limits = MESSAGE) -> Tree:
    """The tree that ``pack`` wrote. ``UnreadableError`` where it is none, or more than the limits take in."""
    array = record[LEAVES] if isinstance(record, ArrayRecord) and LEAVES in record else None
    if array is None or array.stype != STYPE:
        raise UnreadableError("the arrays are no tree of leaves.")
    if (array.dtype, tuple(array.shape)) != ("uint8", (len(array.data),)):
        raise UnreadableError(f"the array is told to be {array.dtype} {tuple(array.shape)} of {len(array.data)} bytes.")
    try:
        return decode_tree(array.data, limits)
    except RefusedHeaderError as error:
        raise UnreadableError(f"the arrays are no tree of leaves: {error}.") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UnreadableError(f"the arrays are no tree of leaves ({type(error).__name__}).") from error


def overlay(tree: Tree, other: Tree) -> dict[str, dict]:
    """Replaces leaves of ``tree`` by those that ``other`` has in their places."""
    return {part: {**tree.get(part, {}), **other.get(part, {})} for part in {**tree, **other}}


def base_updates_to_record(rounds: Sequence[BaseUpdate]) -> ArrayRecord:
    """Several rounds of base updates, numbered from 0."""
    trees = {
        f"{i}{SEPARATOR}{key}": factors
        for i, one in enumerate(rounds)
        for key, factors in base_update_to_tree(one).items()
    }
    return tree_to_record(trees)


def record_to_base_updates(record: ArrayRecord) -> list[BaseUpdate]:
    """The base updates that ``pack_folds`` wrote, in order."""
    found: dict[int, dict[str, Mapping]] = {}
    for key, factors in record_to_tree(record).items():
        number, _, rest = key.partition(SEPARATOR)
        if not number.isdecimal() or factors.keys() != {"U", "V"} or not rest.rpartition("/")[2].isdecimal():
            raise UnreadableError("the arrays are no base updates.")
        found.setdefault(int(number), {})[rest] = factors
    return [base_update_from_tree(found[number]) for number in sorted(found)]


def encode_order(order: Order, leaves: Tree, base_updates: Sequence[BaseUpdate]) -> RecordDict:
    """The content of a message to a client; empty records are left out."""
    content = RecordDict({ORDER: ConfigRecord(asdict(order))})
    if leaves:
        content[LEAVES] = tree_to_record(leaves)
    if base_updates:
        content[BASE_UPDATES] = base_updates_to_record(base_updates)
    return content


def decode_order(content: RecordDict) -> tuple[Order, Tree, list[BaseUpdate]]:
    """The order, the leaves and the base updates of a message to a client."""
    order = Order(**{name: content[ORDER][name] for name in Order.__dataclass_fields__})
    leaves = record_to_tree(content[LEAVES]) if LEAVES in content else {}
    return order, leaves, record_to_base_updates(content[BASE_UPDATES]) if BASE_UPDATES in content else []


def encode_answer(metrics: Mapping[str, int | float], holds: str, sent: Tree | None = None) -> RecordDict:
    """The content of a client's reply."""
    content = RecordDict({METRICS: MetricRecord(dict(metrics)), HOLDS: ConfigRecord({HOLDS: holds})})
    if sent is not None:
        content[LEAVES] = tree_to_record(sent)
    return content


def add_round(result: Result, done: Round) -> None:
    """Adds a finished round to the result that Flower's own ``start`` returns."""
    result.arrays = tree_to_record(done.shared)
    result.train_metrics_clientapp[done.number + 1] = MetricRecord(
        {f"loss.{client}": loss for client, loss in done.record["loss"].items()}
    )
    if "clients" in done.record:
        found = {k: v for k, v in done.record["clients"].items() if isinstance(v, int | float)}
        result.evaluate_metrics_clientapp[done.number + 1] = MetricRecord(found)
    if "global" in done.record:
        result.evaluate_metrics_serverapp[done.number + 1] = MetricRecord(dict(done.record["global"]))


def build_layout(rules: Rules, shared: Tree, turns: Sequence[Turn]) -> Layout:
    """Every leaf that a client of these turns may send, known before it has trained."""
    found: dict[str, tuple[int, ...]] = {}
    for turn in turns:
        sent = build_upload_spec(rules, shared, turn).sent
        found |= {name: tuple(x.shape) for name, x in flatten(sent).items()}
    return found


def to_vector(layout: Layout, sent: Tree) -> Tensor:
    """``(d,)`` float32: every leaf's numbers in the layout's order, then a one for each leaf that was sent."""
    own = {name: x.float() for name, x in flatten(sent).items()}
    strange = [name for name, x in own.items() if layout.get(name) != tuple(x.shape)]
    if strange:
        raise ValueError(f"this client would send {strange[0]!r}, which is not in the round's layout.")
    values = [own.get(name, torch.zeros(shape)).cpu().reshape(-1) for name, shape in layout.items()]
    return torch.cat([*values, torch.tensor([float(name in own) for name in layout])])


def vector_size(layout: Layout) -> int:
    """``d``: the length of the vector of ``to_vector``."""
    return sum(torch.Size(shape).numel() + 1 for shape in layout.values())


def from_vector(layout: Layout, mean: Tensor, least: float) -> Tree:
    """Each leaf's mean over the clients that sent it, from the mean of all vectors; without leaves that nobody sent.

    ``least`` is the smallest share that a client can have in that mean.
    """
    there = mean[mean.numel() - len(layout) :]
    leaves: dict[str, Tensor] = {}
    at = 0
    for (name, shape), present in zip(layout.items(), there.tolist()):
        numbers = torch.Size(shape).numel()
        if present > least / 2:
            everyone = abs(present - 1) < 1e-6
            leaves[name] = mean[at : at + numbers].reshape(shape) / (1.0 if everyone else present)
        at += numbers
    return unflatten(leaves)


def encode_layout(layout: Layout) -> ConfigRecord:
    """The layout as three flat lists, since a record holds no nested ones."""
    shapes = list(layout.values())
    sizes = [size for shape in shapes for size in shape]
    return ConfigRecord({"names": list(layout), "ranks": [len(shape) for shape in shapes], "sizes": sizes})


def decode_layout(record: Mapping[str, Any]) -> Layout:
    """The layout that ``encode_layout`` was given."""
    sizes = iter(record["sizes"])
    return {name: tuple(next(sizes) for _ in range(rank)) for name, rank in zip(record["names"], record["ranks"])}
