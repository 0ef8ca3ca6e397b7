"""What a reply must be before it can touch the aggregate."""

import math
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedlora.engines.flower.layout import expected
from fedlora.engines.flower.records import UnreadableError, unpack
from fedlora.engines.loop import Federation
from fedlora.limits import shown, upload_limits
from fedlora.method import Method
from fedlora.metrics import KNOWN, Scores, possible
from fedlora.types import Layer, Tree, Turn

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 65504.0  # of a trained number, float16's; far beyond it, factorisations of sums overflow


class RefusedError(ValueError):
    """A reply that is left out; the text says why."""


# What reading a record that is not what was agreed may raise: the reply is left out, and the round goes on.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, MemoryError)


def told(error: BaseException) -> str:
    """Why a reply is left out, fit for a log whatever the party wrote into it."""
    if isinstance(error, RefusedError | UnreadableError):
        return shown(error)
    return f"its reply is malformed ({type(error).__name__}: {shown(error)})"


def arrived(f: Federation, shared: Tree, turn: Turn, record: ArrayRecord) -> tuple[Tree, Tree]:
    """An upload as it crossed and as ``upload`` has it. ``UnreadableError`` where it is too large, or no tree."""
    crossed = unpack(record, upload_limits(f.transport.max_upload_mb))
    return crossed, upload(f, shared, turn, crossed)


def upload(f: Federation, shared: Tree, turn: Turn, sent: Tree) -> Tree:
    """The upload with every part of the model, float32 as the server's leaves.

    ``RefusedError`` where it has not the leaves that this client's turn sends, with their shapes and finite numbers.
    """
    needed, exact = expected(f.rules, shared, turn)
    try:
        sent = f.transport.arrived(f.rules, shared, turn, sent)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    strange = sorted(sent.keys() - f.rules.keys())
    if strange:
        raise RefusedError(f"it sent the part {strange[0]!r}, which the model does not have")
    return {p: _layer(p, rule, needed[p], sent.get(p, {}), exact, turn.rank) for p, rule in f.rules.items()}


def mean(f: Federation, found: Tree) -> Tree:
    """A round's mean, with every part of the model: leaves that nobody sent are missing."""
    for layer in found.values():
        for leaf, x in layer.items():
            if not bool(torch.isfinite(x).all()):
                raise RefusedError(f"the mean of {leaf!r} is not finite")
    return {part: found.get(part, {}) for part in f.rules}


def _layer(part: str, rule: Method, needed: Layer, sent: Layer, exact: bool, rank: int) -> dict[str, Tensor]:
    odd = sorted(sent.keys() - needed.keys()) or (sorted(needed.keys() - sent.keys()) if exact else [])
    if odd:
        what = "it did not send" if odd[0] in needed else "it sent"
        raise RefusedError(f"{what} the leaf {odd[0]!r} of {part!r}")
    shapes = _shapes(sent)
    if shapes != _shapes({leaf: needed[leaf] for leaf in sent}) and not _pruned(rule, needed, shapes, rank):
        wrong = next(leaf for leaf in sent if shapes[leaf] != tuple(needed[leaf].shape))
        raise RefusedError(
            f"it sent {wrong!r} of {part!r} with shape {shapes[wrong]}, not {tuple(needed[wrong].shape)}"
        )
    for leaf, x in sent.items():
        if x.dtype not in PLAIN or not bool((x.float().abs() <= LARGEST).all()):
            raise RefusedError(f"it sent {leaf!r} of {part!r} with values that are no finite numbers, or no plain ones")
    return {leaf: sent[leaf].to(needed[leaf].dtype) for leaf in sorted(sent)}


def _shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    return {leaf: tuple(x.shape) for leaf, x in layer.items()}


def _pruned(rule: Method, needed: Layer, shapes: Mapping[str, tuple[int, ...]], rank: int) -> bool:
    """Whether a client that may differ in rank has sent a smaller one, the same in all its leaves."""
    smaller = range(1, rank) if rule.any_rank else ()
    return any(_shapes(rule.adapter.leading(needed, r)) == shapes for r in smaller)


def holding(expected: str, said: Mapping[str, object]) -> None:
    """``RefusedError`` where a party does not hold what it was sent."""
    if said.get("holds") != expected:
        raise RefusedError("it does not hold what it was sent")


def figures(metrics: Mapping[str, object], number: int) -> tuple[int, float]:
    """Rows and loss of a turn. ``RefusedError`` where they are of another round, or no numbers."""
    if metrics.get("round") != number:
        raise RefusedError(f"it answered for round {metrics.get('round')!r}, not {number}")
    rows, loss = metrics.get("examples"), metrics.get("loss")
    if type(rows) is not int or rows < 1:
        raise RefusedError(f"it claims {rows!r} training rows")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise RefusedError(f"its loss is {loss!r}")
    return rows, loss


def scores(metrics: Mapping[str, object], number: int, metric: str) -> Scores:
    """A client's sums and counts. ``RefusedError`` where they are of another round, or no numbers."""
    if metrics.get("round") != number:
        raise RefusedError(f"it answered for round {metrics.get('round')!r}, not {number}")
    names = [key.removesuffix(".sum") for key in metrics if key.endswith(".sum")]
    found = {name: (metrics[f"{name}.sum"], metrics.get(f"{name}.count")) for name in names}
    for name, (total, count) in found.items():
        sound = isinstance(total, int | float) and math.isfinite(total) and type(count) is int and count > 0
        if not sound or not possible(name, total, count):
            raise RefusedError(f"its score {name!r} is {total!r} over {count!r} rows")
    lacking = [name for name in KNOWN[metric].needs if name not in found]
    if lacking:
        raise RefusedError(f"its scores are {', '.join(found) or 'none'}, without {lacking[0]}")
    return Scores(found)
