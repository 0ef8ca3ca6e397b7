"""Checks of a reply before its upload is screened; the upload itself is screened as in every engine."""

import math
from collections.abc import Mapping

from flwr.app import RecordDict

from fedlora.flower.wire import HOLDS, METRICS, Order
from fedlora.security.validation.expected import RefusedError
from fedlora.tasks.metrics.scores import KNOWN_METRICS, PARTS, Scores, is_possible
from fedlora.text import display_safe

# The errors that an unexpected record may raise: the reply is left out, and the round goes on.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, MemoryError)


def describe_refusal(error: BaseException, own: type[Exception] = RefusedError) -> str:
    """Return the reason why a reply is left out, safe for a log regardless of the client's text.

    The text of an error of the type ``own`` is a sentence. All other errors mean that a record is malformed.
    """
    if isinstance(error, own):
        return display_safe(error)
    return f"its reply is malformed ({type(error).__name__}: {display_safe(error)})"


def read_metrics(order: Order, content: RecordDict) -> Mapping[str, object]:
    """Return a reply's metrics. Raises ``RefusedError`` if it is of another round, or the client holds other leaves."""
    metrics = content[METRICS]
    if content[HOLDS].get(HOLDS) != order.holds:
        raise RefusedError("it does not hold what it was sent")
    if metrics.get("round") != order.round:
        raise RefusedError(f"it answered for round {metrics.get('round')!r}, not {order.round}")
    return metrics


def read_figures(metrics: Mapping[str, object], may_lack_loss: bool = False) -> tuple[int, float | None]:
    """Return rows and loss of a turn; None for the loss that a client's own trainer does not return.

    Raises ``RefusedError`` if they are no numbers.
    """
    rows, loss = metrics.get("examples"), metrics.get("loss")
    if type(rows) is not int or rows < 1:
        raise RefusedError(f"it claims {rows!r} training rows")
    if loss is None and may_lack_loss:
        return rows, None
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise RefusedError(f"its loss is {loss!r}")
    return rows, loss


def read_scores(metrics: Mapping[str, object], metric: str, own: bool = False) -> Scores:
    """Return a client's sums and counts. Raises ``RefusedError`` if they are no numbers, or impossible.

    Sums with unknown names are left out, unless the task's metrics are its ``own``.
    """
    names = [key.removesuffix(".sum") for key in metrics if key.endswith(".sum")]
    known = KNOWN_METRICS.keys() | PARTS | {metric}
    names = names if own else [name for name in names if name.partition(".")[0] in known]
    scores = {name: (metrics[f"{name}.sum"], metrics.get(f"{name}.count")) for name in names}
    for name, (total, count) in scores.items():
        sound = isinstance(total, int | float) and math.isfinite(total) and type(count) is int and count > 0
        if not sound or not is_possible(name, total, count):
            raise RefusedError(f"its score {name!r} is {total!r} over {count!r} rows")
    needs = (metric,) if own or metric not in KNOWN_METRICS else KNOWN_METRICS[metric].needs
    lacking = [name for name in needs if name not in scores]
    if lacking:
        raise RefusedError(f"its scores are {', '.join(scores) or 'none'}, without {lacking[0]}")
    return Scores(scores)
