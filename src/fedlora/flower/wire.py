"""Trees and orders as Flower's records, and back.

A tree goes as one array of bytes in safetensors form: any dtype (Flower's own arrays refuse bfloat16), no pickle, and
one object on the wire instead of two for each leaf.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError

from fedlora.engines.base_updates import Folds, folds_from_tree, folds_to_tree
from fedlora.engines.comm.channel import Delivery
from fedlora.engines.loop import Round
from fedlora.files import SEPARATOR, Limits, RefusedHeaderError, decode_tree, encode_tree
from fedlora.types import Tree

MESSAGE = Limits(2**31, 100_000, 2**24)  # of what the server sends; uploads have a limit of their own
STYPE = "safetensors"  # how an array of ours is written, where Flower would write npy
LEAVES, FOLDS, ORDER, METRICS, HOLDS = "leaves", "folds", "order", "metrics", "holds"


@dataclass(frozen=True)
class Order:
    """What a message asks of a party, beside the leaves and folds that it brings."""

    run: str  # the run's own token: a resumed run keeps it, another run never has it
    round: int  # from 0
    client: int
    full: bool  # the leaves are those that differ from what the seed gives, not from what the party holds
    first: int  # number of the first fold that comes along
    after: int  # folds that the party holds then
    before: str  # the name of the base with the folds before ``first`` in it
    base: str  # and with those before ``after``
    holds: str  # digest of the leaves that the party holds then
    counted: int = -1  # the last round that this party's upload went into


class Asked(NamedTuple):
    """What a message asked of a client, and what it brought along."""

    node: int
    client: int
    order: Order
    delivery: Delivery | None


class UnreadableError(ValueError):
    """A record that is not what was agreed."""


def pack(tree: Tree) -> ArrayRecord:
    """One array of bytes."""
    content = encode_tree(tree)
    return ArrayRecord({LEAVES: Array(dtype="uint8", shape=(len(content),), stype=STYPE, data=content)})


def unpack(record: ArrayRecord, limits: Limits = MESSAGE) -> Tree:
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


def pack_folds(rounds: Sequence[Folds]) -> ArrayRecord:
    """Several rounds of folds, numbered from 0."""
    trees = {
        f"{i}{SEPARATOR}{key}": factors for i, one in enumerate(rounds) for key, factors in folds_to_tree(one).items()
    }
    return pack(trees)


def unpack_folds(record: ArrayRecord) -> list[Folds]:
    """The folds that ``pack_folds`` wrote, in order."""
    found: dict[int, dict[str, Mapping]] = {}
    for key, factors in unpack(record).items():
        number, _, rest = key.partition(SEPARATOR)
        if not number.isdecimal() or factors.keys() != {"U", "V"} or not rest.rpartition("/")[2].isdecimal():
            raise UnreadableError("the arrays are no folds.")
        found.setdefault(int(number), {})[rest] = factors
    return [folds_from_tree(found[number]) for number in sorted(found)]


def asked(order: Order, leaves: Tree, folds: Sequence[Folds]) -> RecordDict:
    """What goes down; empty records are left out."""
    content = RecordDict({ORDER: ConfigRecord(asdict(order))})
    if leaves:
        content[LEAVES] = pack(leaves)
    if folds:
        content[FOLDS] = pack_folds(folds)
    return content


def order_of(content: RecordDict) -> tuple[Order, Tree, list[Folds]]:
    """What a party is asked, and what came along."""
    order = Order(**_typed(content[ORDER]))
    leaves = unpack(content[LEAVES]) if LEAVES in content else {}
    return order, leaves, unpack_folds(content[FOLDS]) if FOLDS in content else []


def _typed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in Order.__dataclass_fields__}


def answered(metrics: Mapping[str, int | float], holds: str, sent: Tree | None = None) -> RecordDict:
    """What goes up."""
    content = RecordDict({METRICS: MetricRecord(dict(metrics)), HOLDS: ConfigRecord({HOLDS: holds})})
    if sent is not None:
        content[LEAVES] = pack(sent)
    return content


def reported(result: Result, done: Round) -> None:
    """Adds a finished round to what Flower's own ``start`` returns."""
    result.arrays = pack(done.shared)
    result.train_metrics_clientapp[done.number + 1] = MetricRecord(
        {f"loss.{client}": loss for client, loss in done.record["loss"].items()}
    )
    if "clients" in done.record:
        found = {k: v for k, v in done.record["clients"].items() if isinstance(v, int | float)}
        result.evaluate_metrics_clientapp[done.number + 1] = MetricRecord(found)
    if "global" in done.record:
        result.evaluate_metrics_serverapp[done.number + 1] = MetricRecord(dict(done.record["global"]))
