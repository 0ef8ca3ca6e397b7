"""Figures from sums: what a client's rows add up to is additive, and every figure is a function of the sums.

So one figure can be had for one client, for all clients' rows together, or as a mean over clients, and nothing but a
few sums ever leaves a client.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    def value(self, sums: Sums) -> float:
        """The figure, of sums that hold all that it needs."""
        return self.of(*(sums[name] for name in self.needs))


@dataclass(frozen=True)
class Macro(Metric):
    """The mean over labels of a figure whose sums are there for each label, as ``NAME.LABEL``.

    Labels that neither occur nor were predicted count in it no more than in scikit-learn's.
    """

    def value(self, sums: Sums) -> float:
        """The mean over labels with all sums; 0 where no label occurs."""
        kinds = [name.partition(".")[0] for name in self.needs]
        labels = [name.partition(".")[2] for name in sums if name.startswith(f"{kinds[0]}.")]
        tables = [[sums.get(f"{kind}.{label}", (0, 0)) for kind in kinds] for label in labels]
        there = [self.of(*table) for table in tables if any(total for total, _ in table)]
        return math.fsum(there) / len(there) if there else 0.0


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
    below = (a + b) * (a + c) * (d + b) * (d + c)
    return (a * d - b * c) / math.sqrt(below) if below > 0 else 0.0  # below 0 only where a party made it up


def _pearson(x, y, xx, yy, xy) -> float:
    n = x[1]
    vx, vy = xx[0] - x[0] * x[0] / n, yy[0] - y[0] * y[0] / n
    # Nothing goes with a constant column, as with Matthews'; what its variance shows is rounding.
    if min(vx / max(xx[0], 1e-300), vy / max(yy[0], 1e-300)) < 1e-12:
        return 0.0
    return (xy[0] - x[0] * y[0] / n) / (math.sqrt(vx) * math.sqrt(vy))


def _perplexity(nll) -> float:
    return math.exp(min(nll[0] / nll[1], 700.0))  # beyond it there is no such float


CONFUSION = ("tp", "fp", "fn")  # of the second of two labels
PER_LABEL = tuple(f"{name}.0" for name in CONFUSION)  # and so on, for every label
MOMENTS = ("x", "y", "xx", "yy", "xy")  # predictions x, targets y

KNOWN = {
    metric.name: metric
    for metric in (
        _mean("accuracy"),
        Metric("f1", CONFUSION, _f1),
        Metric("matthews", CONFUSION, _matthews),
        Macro("macro_f1", PER_LABEL, _f1),
        _mean("accuracy_mismatched"),
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
SHARES = frozenset(  # 0 to the count
    ("accuracy", "accuracy_mismatched", *CONFUSION, "exact_match", "answer_f1", "pass@1", "token_accuracy", "success")
)
SIGNED = frozenset(("spearman",))  # minus the count to the count


def possible(name: str, total: float, count: int) -> bool:
    """Whether a sum of this name over ``count`` rows can be ``total``."""
    name = name.partition(".")[0]  # one label's
    least, most = (0 if name in SHARES else -count), count
    return not (name in SHARES or name in SIGNED) or least <= total <= most


def moments(x: Sequence[float], y: Sequence[float]) -> dict[str, tuple[float, int]]:
    """The sums that Pearson's correlation of predictions ``x`` with targets ``y`` is made of."""
    pairs = {"x": x, "y": y, "xx": [a * a for a in x], "yy": [b * b for b in y], "xy": [a * b for a, b in zip(x, y)]}
    return {name: (math.fsum(values), len(x)) for name, values in pairs.items()}


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of the ranks, equal values sharing theirs; 0 where one side is constant."""
    from scipy.stats import rankdata

    return _pearson(*moments(*(rankdata(values).tolist() for values in (x, y))).values())


def figures(scores: Scores) -> dict[str, float]:
    """Every metric that the sums suffice for."""
    return {
        name: metric.value(scores.sums) for name, metric in KNOWN.items() if scores.sums.keys() >= set(metric.needs)
    }


def pooled(scores: Iterable[Scores]) -> Scores:
    """All rows together."""
    found: dict[str, tuple[float, int]] = {}
    for one in scores:
        for name, (total, count) in one.sums.items():
            before = found.get(name, (0, 0))
            found[name] = (before[0] + total, before[1] + count)
    return Scores(found)
