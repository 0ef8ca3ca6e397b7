"""Conversion of trees, orders and answers to Flower's records, and back.

A tree is sent as one array of bytes in safetensors form. This supports any dtype (Flower's own arrays do not support
bfloat16), needs no pickle, and sends one object instead of two for each leaf. With secure aggregation, an upload is one
vector, and a layout lists its leaves.
"""

import json
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
from fedlora.security.validation.expected import RefusedError, build_upload_spec
from fedlora.types import Tree, Turn

MESSAGE = Limits(2**31, 100_000, 2**24)  # for messages of the server; uploads have a limit of their own
STYPE = "safetensors"  # the format of our arrays, in place of Flower's npy
LEAVES, BASE_UPDATES, ORDER, METRICS, HOLDS = "leaves", "base_updates", "order", "metrics", "holds"

QUERY = "model_query"  # before a run of clients with their own trainers

Layout = Mapping[str, tuple[int, ...]]  # ``part/leaf`` -> shape


@dataclass(frozen=True)
class Order:
    """The instructions of a message to a client, beside its leaves and base updates."""

    run: str  # the run's token: a resumed run keeps it, and no other run has it
    round: int  # from 0
    client: int
    full: bool  # the leaves are relative to the initial leaves of the seed, not to those that the client holds
    first: int  # number of the first base update in the message
    after: int  # number of base updates that the client holds afterwards
    before: str  # name of the base with the base updates before ``first``
    base: str  # name of the base with the base updates before ``after``
    holds: str  # digest of the leaves that the client holds afterwards
    counted: int = -1  # the last round whose result includes an upload of this client


class SentOrder(NamedTuple):
    """An order that was sent to a client, with the delivery in the same message, if there is one."""

    node: int
    order: Order
    delivery: Delivery | None


def tree_to_record(tree: Tree) -> ArrayRecord:
    """Convert a tree to a record of one array of bytes."""
    content = encode_tree(tree)
    return ArrayRecord({LEAVES: Array(dtype="uint8", shape=(len(content),), stype=STYPE, data=content)})


def record_to_tree(record: ArrayRecord, limits: Limits = MESSAGE) -> Tree:
    """Invert ``tree_to_record``. Raises ``RefusedError`` if the record holds no tree, or exceeds the limits."""
    array = record[LEAVES] if isinstance(record, ArrayRecord) and LEAVES in record else None
    if array is None or array.stype != STYPE:
        raise RefusedError("the arrays are no tree of leaves.")
    if (array.dtype, tuple(array.shape)) != ("uint8", (len(array.data),)):
        raise RefusedError(
            f"the array is declared as {array.dtype} {tuple(array.shape)} and has {len(array.data)} bytes."
        )
    try:
        return decode_tree(array.data, limits)
    except RefusedHeaderError as error:
        raise RefusedError(f"the arrays are no tree of leaves: {error}.") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RefusedError(f"the arrays are no tree of leaves ({type(error).__name__}).") from error


def overlay(tree: Tree, other: Tree) -> dict[str, dict]:
    """Replace leaves of ``tree`` by the leaves of ``other`` with the same names."""
    return {part: {**tree.get(part, {}), **other.get(part, {})} for part in {**tree, **other}}


def base_updates_to_record(rounds: Sequence[BaseUpdate]) -> ArrayRecord:
    """Convert the base updates of several rounds to one record; the rounds are numbered from 0."""
    return tree_to_record(
        {
            f"{i}{SEPARATOR}{key}": factors
            for i, base_update in enumerate(rounds)
            for key, factors in base_update_to_tree(base_update).items()
        }
    )


def record_to_base_updates(record: ArrayRecord) -> list[BaseUpdate]:
    """Invert ``base_updates_to_record``."""
    rounds: dict[int, dict[str, Mapping]] = {}
    for key, factors in record_to_tree(record).items():
        number, _, name = key.partition(SEPARATOR)
        if not number.isdecimal() or factors.keys() != {"U", "V"} or not name.rpartition("/")[2].isdecimal():
            raise RefusedError("the arrays are no base updates.")
        rounds.setdefault(int(number), {})[name] = factors
    return [base_update_from_tree(rounds[number]) for number in sorted(rounds)]


def encode_order(order: Order, delivery: Delivery | None) -> RecordDict:
    """Return the content of a message to a client. Empty records are left out."""
    content = RecordDict({ORDER: ConfigRecord(asdict(order))})
    if delivery and delivery.leaves:
        content[LEAVES] = tree_to_record(delivery.leaves)
    if delivery and delivery.base_updates:
        content[BASE_UPDATES] = base_updates_to_record(delivery.base_updates)
    return content


def decode_order(content: RecordDict) -> tuple[Order, Tree, list[BaseUpdate]]:
    """Return the order, the leaves and the base updates of a message to a client."""
    order = Order(**{name: content[ORDER][name] for name in Order.__dataclass_fields__})
    leaves = record_to_tree(content[LEAVES]) if LEAVES in content else {}
    return order, leaves, record_to_base_updates(content[BASE_UPDATES]) if BASE_UPDATES in content else []


def encode_answer(metrics: Mapping[str, int | float], holds: str, sent: Tree | None = None) -> RecordDict:
    """Return the content of a client's reply."""
    content = RecordDict({METRICS: MetricRecord(dict(metrics)), HOLDS: ConfigRecord({HOLDS: holds})})
    if sent is not None:
        content[LEAVES] = tree_to_record(sent)
    return content


def add_round(result: Result, done: Round) -> None:
    """Add a finished round to the result that Flower's ``start`` returns."""
    number, record = done.number + 1, done.record
    result.arrays = tree_to_record(done.shared)
    losses = {f"loss.{client}": loss for client, loss in record["loss"].items() if loss is not None}
    result.train_metrics_clientapp[number] = MetricRecord(losses)
    if "clients" in record:
        scores = {k: v for k, v in record["clients"].items() if isinstance(v, int | float)}
        result.evaluate_metrics_clientapp[number] = MetricRecord(scores)
    if "global" in record:
        result.evaluate_metrics_serverapp[number] = MetricRecord(dict(record["global"]))


def build_layout(rules: Rules, shared: Tree, turns: Sequence[Turn]) -> Layout:
    """Return the shape of every leaf that a client of these turns may send; it is known before they train."""
    layout: dict[str, tuple[int, ...]] = {}
    for turn in turns:
        sent = build_upload_spec(rules, shared, turn).sent
        layout |= {name: tuple(x.shape) for name, x in flatten(sent).items()}
    return layout


def to_vector(layout: Layout, sent: Tree) -> Tensor:
    """Return ``(d,)`` float32: the values of all leaves in the layout's order, then a 1 for each leaf that is sent."""
    leaves = {name: x.float() for name, x in flatten(sent).items()}
    unexpected = [name for name, x in leaves.items() if layout.get(name) != tuple(x.shape)]
    if unexpected:
        raise ValueError(f"this client would send {unexpected[0]!r}, which is not in the round's layout.")
    values = [leaves.get(name, torch.zeros(shape)).cpu().reshape(-1) for name, shape in layout.items()]
    return torch.cat([*values, torch.tensor([float(name in leaves) for name in layout])])


def vector_size(layout: Layout) -> int:
    """Return ``d``, the length of ``to_vector``."""
    return sum(torch.Size(shape).numel() + 1 for shape in layout.values())


def from_vector(layout: Layout, mean: Tensor, least: float) -> Tree:
    """Return each leaf's mean over the clients that sent it, from the mean of all vectors.

    Leaves that no client sent are left out. ``least`` is the smallest weight of a client in the mean. Raises
    ``RefusedError`` for a mean that is not finite.
    """
    senders = mean[mean.numel() - len(layout) :]  # for each leaf, the total weight of the clients that sent it
    leaves: dict[str, Tensor] = {}
    start = 0
    for (name, shape), weight in zip(layout.items(), senders.tolist()):
        size = torch.Size(shape).numel()
        if weight > least / 2:
            all_sent = abs(weight - 1) < 1e-6
            leaves[name] = mean[start : start + size].reshape(shape) / (1.0 if all_sent else weight)
            if not bool(leaves[name].isfinite().all()):
                raise RefusedError(f"the mean of {name!r} is not finite")
        start += size
    return unflatten(leaves)


def encode_layout(layout: Layout) -> ConfigRecord:
    """Return the layout as JSON, since a record holds no nested lists."""
    return ConfigRecord({"leaves": json.dumps(layout)})


def decode_layout(record: Mapping[str, Any]) -> Layout:
    """Invert ``encode_layout``."""
    return {name: tuple(shape) for name, shape in json.loads(record["leaves"]).items()}
