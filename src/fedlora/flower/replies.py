"""Checks of a reply before its upload is looked at; the upload itself is screened as in every engine."""

import math
from collections.abc import Mapping

import torch

from fedlora.flower.wire import UnreadableError
from fedlora.rounds import Rules
from fedlora.security.validation.expected import RefusedError
from fedlora.tasks.metrics.scores import KNOWN, Scores, possible
from fedlora.text import display_safe
from fedlora.types import Tree

# What reading a record that is not what was agreed may raise: the reply is left out, and the round goes on.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, MemoryError)


def describe_error(error: BaseException, worded: tuple[type[Exception], ...] = (RefusedError, UnreadableError)) -> str:
    """Why a reply is left out, fit for a log whatever the client wrote into it.

    Errors of the kinds ``worded`` have a sentence of ours as their text; all others mean that a record is malformed.
    """
    if isinstance(error, worded):
        return display_safe(error)
    return f"its reply is malformed ({type(error).__name__}: {display_safe(error)})"


def check_mean(rules: Rules, found: Tree) -> Tree:
    """Checks a round's mean, and returns it with every part of the model: leaves that nobody sent are missing."""
    for layer in found.values():
        for leaf, x in layer.items():
            if not bool(torch.isfinite(x).all()):
                raise RefusedError(f"the mean of {leaf!r} is not finite")
    return {part: found.get(part, {}) for part in rules}


def check_holds(expected: str, said: Mapping[str, object]) -> None:
    """``RefusedError`` where a client does not hold what it was sent."""
    if said.get("holds") != expected:
        raise RefusedError("it does not hold what it was sent")


def read_figures(metrics: Mapping[str, object], number: int) -> tuple[int, float]:
    """Rows and loss of a turn. ``RefusedError`` where they are of another round, or no numbers."""
    if metrics.get("round") != number:
        raise RefusedError(f"it answered for round {metrics.get('round')!r}, not {number}")
    rows, loss = metrics.get("examples"), metrics.get("loss")
    if type(rows) is not int or rows < 1:
        raise RefusedError(f"it claims {rows!r} training rows")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise RefusedError(f"its loss is {loss!r}")
    return rows, loss


def read_scores(metrics: Mapping[str, object], number: int, metric: str) -> Scores:
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
