"""Figures from sums: what a client's rows add up to is additive, and every figure is a function of the sums.

So one figure can be had for one client, for all clients' rows together, or as a mean over clients, and nothing but a
few sums ever leaves a client.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Sums = Mapping[str, tuple[float, int]]  # name -> sum, count


@dataclass(frozen=True)
class Scores:
    """Sums and counts, so that a report can take the mean over rows or over clients: ``{name: (sum, count)}``."""

    sums: Sums


@dataclass(frozen=True)
class Metric:
    """A figure, what it is made of, and which way is better."""

    name: str
    needs: tuple[str, ...]  # names of sums
    of: Callable[..., float]  # of the needed sums, each as (sum, count)
    higher: bool = True  # is better


def _mean(name: str, higher: bool = True) -> Metric:
    return Metric(name, (name,), lambda pair: pair[0] / pair[1], higher)


def _f1(tp, fp, fn) -> float:
    """``2 tp / (2 tp + fp + fn)``; 0 where there is nothing to find and nothing was found, as scikit-learn has it."""
    below = 2 * tp[0] + fp[0] + fn[0]
    return 2 * tp[0] / below if below else 0.0


def _matthews(tp, fp, fn) -> float:
    """Matthews' correlation; 0 where a row or column of the table is empty, as scikit-learn has it."""
    a, b, c = tp[0], fp[0], fn[0]
    d = tp[1] - a - b - c
    below = math.sqrt((a + b) * (a + c) * (d + b) * (d + c))
    return (a * d - b * c) / below if below else 0.0


def _pearson(x, y, xx, yy, xy) -> float:
    n = x[1]
    vx, vy = xx[0] - x[0] ** 2 / n, yy[0] - y[0] ** 2 / n
    # Nothing goes with a constant column, as with Matthews'; what its variance shows is rounding.
    if min(vx / max(xx[0], 1e-300), vy / max(yy[0], 1e-300)) < 1e-12:
        return 0.0
    return (xy[0] - x[0] * y[0] / n) / math.sqrt(vx * vy)


def _perplexity(nll) -> float:
    return math.exp(min(nll[0] / nll[1], 700.0))  # beyond it there is no such float


CONFUSION = ("tp", "fp", "fn")  # of the second of two labels
MOMENTS = ("x", "y", "xx", "yy", "xy")  # predictions x, targets y

KNOWN = {
    metric.name: metric
    for metric in (
        _mean("accuracy"),
        Metric("f1", CONFUSION, _f1),
        Metric("matthews", CONFUSION, _matthews),
        Metric("pearson", MOMENTS, _pearson),
        _mean("spearman"),
        _mean("mse", higher=False),
        _mean("exact_match"),
        _mean("answer_f1"),
        _mean("pass@1"),
        _mean("token_accuracy"),
        Metric("perplexity", ("nll",), _perplexity, higher=False),
        _mean("nll", higher=False),
        _mean("loss", higher=False),
    )
}
SHARES = frozenset(("accuracy", *CONFUSION, "exact_match", "answer_f1", "pass@1", "token_accuracy"))  # 0 to the count


def figures(scores: Scores) -> dict[str, float]:
    """Every metric that the sums suffice for."""
    return {
        name: metric.of(*(scores.sums[need] for need in metric.needs))
        for name, metric in KNOWN.items()
        if scores.sums.keys() >= set(metric.needs)
    }


def pooled(scores: Iterable[Scores]) -> Scores:
    """All rows together."""
    found: dict[str, tuple[float, int]] = {}
    for one in scores:
        for name, (total, count) in one.sums.items():
            before = found.get(name, (0, 0))
            found[name] = (before[0] + total, before[1] + count)
    return Scores(found)
