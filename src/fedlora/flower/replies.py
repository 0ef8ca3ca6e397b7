"""What a reply must be before its upload is looked at; the upload itself is for hygiene, as in every engine."""

import math
from collections.abc import Mapping

import torch

from fedlora.engines.federation import Federation
from fedlora.flower.wire import UnreadableError
from fedlora.security.validation.expected import RefusedError
from fedlora.tasks.metrics.scores import KNOWN, Scores, possible
from fedlora.text import shown
from fedlora.types import Tree

__all__ = ["MALFORMED", "RefusedError", "figures", "holding", "mean", "scores", "told"]

# What reading a record that is not what was agreed may raise: the reply is left out, and the round goes on.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, MemoryError)


def told(error: BaseException) -> str:
    """Why a reply is left out, fit for a log whatever the party wrote into it."""
    if isinstance(error, RefusedError | UnreadableError):
        return shown(error)
    return f"its reply is malformed ({type(error).__name__}: {shown(error)})"


def mean(f: Federation, found: Tree) -> Tree:
    """A round's mean, with every part of the model: leaves that nobody sent are missing."""
    for layer in found.values():
        for leaf, x in layer.items():
            if not bool(torch.isfinite(x).all()):
                raise RefusedError(f"the mean of {leaf!r} is not finite")
    return {part: found.get(part, {}) for part in f.rules}


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
