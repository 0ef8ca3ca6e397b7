"""Checks of a reply before its upload is screened; the upload itself is screened as in every engine."""

import math
from collections.abc import Mapping

import torch

from fedlora.flower.wire import HOLDS, UnreadableError
from fedlora.rounds import Rules
from fedlora.security.validation.expected import RefusedError
from fedlora.tasks.metrics.scores import KNOWN_METRICS, Scores, is_possible
from fedlora.text import display_safe
from fedlora.types import Tree

# The errors that an unexpected record may raise: the reply is left out, and the round goes on.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, MemoryError)


def describe_refusal(error: BaseException, own: tuple[type[Exception], ...] = (RefusedError, UnreadableError)) -> str:
    """Return the reason why a reply is left out, safe for a log regardless of the client's text.

    The text of an error of the types ``own`` is a sentence. All other errors mean that a record is malformed.
    """
    if isinstance(error, own):
        return display_safe(error)
    return f"its reply is malformed ({type(error).__name__}: {display_safe(error)})"


def check_mean(rules: Rules, mean: Tree) -> Tree:
    """Check a round's mean, and return it with every part of the model. Leaves that no client sent are missing."""
    for layer in mean.values():
        for leaf, x in layer.items():
            if not bool(torch.isfinite(x).all()):
                raise RefusedError(f"the mean of {leaf!r} is not finite")
    return {part: mean.get(part, {}) for part in rules}


def check_holds(expected: str, record: Mapping[str, object]) -> None:
    """Raise ``RefusedError`` if a client does not hold the leaves that it was sent."""
    if record.get(HOLDS) != expected:
        raise RefusedError("it does not hold what it was sent")


def _check_round(metrics: Mapping[str, object], number: int) -> None:
    if metrics.get("round") != number:
        raise RefusedError(f"it answered for round {metrics.get('round')!r}, not {number}")


def read_figures(metrics: Mapping[str, object], number: int) -> tuple[int, float]:
    """Return rows and loss of a turn. Raises ``RefusedError`` if they are of another round, or no numbers."""
    _check_round(metrics, number)
    rows, loss = metrics.get("examples"), metrics.get("loss")
    if type(rows) is not int or rows < 1:
        raise RefusedError(f"it claims {rows!r} training rows")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise RefusedError(f"its loss is {loss!r}")
    return rows, loss


def read_scores(metrics: Mapping[str, object], number: int, metric: str) -> Scores:
    """Return a client's sums and counts. Raises ``RefusedError`` if they are of another round, or no numbers."""
    _check_round(metrics, number)
    names = [key.removesuffix(".sum") for key in metrics if key.endswith(".sum")]
    scores = {name: (metrics[f"{name}.sum"], metrics.get(f"{name}.count")) for name in names}
    for name, (total, count) in scores.items():
        sound = isinstance(total, int | float) and math.isfinite(total) and type(count) is int and count > 0
        if not sound or not is_possible(name, total, count):
            raise RefusedError(f"its score {name!r} is {total!r} over {count!r} rows")
    lacking = [name for name in KNOWN_METRICS[metric].needs if name not in scores]
    if lacking:
        raise RefusedError(f"its scores are {', '.join(scores) or 'none'}, without {lacking[0]}")
    return Scores(scores)
