"""Metrics from sums over rows. The sums add up over clients, and only they leave a client."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Sum = tuple[float, int]  # with the count of its rows
Sums = Mapping[str, Sum]


@dataclass(frozen=True)
class Scores:
    """Sums over rows with their counts."""

    sums: Sums


@dataclass(frozen=True)
class Metric:
    """A metric, the sums that it needs, and whether higher is better."""

    name: str
    needs: tuple[str, ...]  # names of sums
    formula: Callable[..., float]  # of the needed sums, each as (sum, count)
    higher: bool = True  # is better

    def value(self, sums: Sums) -> float:
        """Return the metric of sums that include all that it needs."""
        return self.formula(*(sums[name] for name in self.needs))


@dataclass(frozen=True)
class Macro(Metric):
    """The mean over labels of a metric whose sums have the names ``NAME.LABEL``.

    As in scikit-learn, labels that neither occur nor are predicted do not count.
    """

    def value(self, sums: Sums) -> float:
        """Return the mean over labels, or 0 if no label occurs."""
        kinds = [name.partition(".")[0] for name in self.needs]
        labels = [name.partition(".")[2] for name in sums if name.startswith(f"{kinds[0]}.")]
        tables = [[sums.get(f"{kind}.{label}", (0, 0)) for kind in kinds] for label in labels]
        values = [self.formula(*table) for table in tables if any(total for total, _ in table)]
        return math.fsum(values) / len(values) if values else 0.0


def _mean(name: str, higher: bool = True) -> Metric:
    return Metric(name, (name,), lambda pair: pair[0] / pair[1], higher)


def _f1(tp: Sum, fp: Sum, fn: Sum) -> float:
    """Return ``2 tp / (2 tp + fp + fn)``; 0 if the label neither occurs nor is predicted, as in scikit-learn."""
    below = 2 * tp[0] + fp[0] + fn[0]
    return 2 * tp[0] / below if below else 0.0


def _matthews(tp: Sum, fp: Sum, fn: Sum) -> float:
    """Return Matthews' correlation; 0 if a row or column of the table is empty, as in scikit-learn."""
    a, b, c = tp[0], fp[0], fn[0]
    d = tp[1] - a - b - c
    below = (a + b) * (a + c) * (d + b) * (d + c)
    return (a * d - b * c) / math.sqrt(below) if below > 0 else 0.0  # negative only for invented counts


def _pearson(x: Sum, y: Sum, xx: Sum, yy: Sum, xy: Sum) -> float:
    n = x[1]
    vx, vy = xx[0] - x[0] * x[0] / n, yy[0] - y[0] * y[0] / n
    # 0 for a constant column, as for Matthews'; its computed variance is only rounding error.
    if min(vx / max(xx[0], 1e-300), vy / max(yy[0], 1e-300)) < 1e-12:
        return 0.0
    return (xy[0] - x[0] * y[0] / n) / (math.sqrt(vx) * math.sqrt(vy))


CONFUSION = ("tp", "fp", "fn")  # of label 1 of two
PER_LABEL = tuple(f"{name}.0" for name in CONFUSION)  # and the same for every other label
MOMENTS = ("x", "y", "xx", "yy", "xy")  # predictions x, targets y

KNOWN_METRICS = {
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
        _mean("choice_accuracy"),
        _mean("choice_accuracy_norm"),
        _mean("pass@1"),
        _mean("token_accuracy"),
        # Higher values of the exponential overflow.
        Metric("perplexity", ("nll",), lambda nll: math.exp(min(nll[0] / nll[1], 700.0)), higher=False),
        _mean("nll", higher=False),
        _mean("loss", higher=False),
        _mean("reward_accuracy"),
        _mean("reward_margin"),
        _mean("dpo_loss", higher=False),
    )
}
CHOICE = ("choice_accuracy", "choice_accuracy_norm")  # of the likeliest choice, and of the likeliest per character
SHARES = frozenset(  # sums from 0 to the count
    (
        *("accuracy", "accuracy_mismatched", "exact_match", "answer_f1", "pass@1", "token_accuracy", "success"),
        "reward_accuracy",
        *CONFUSION,
        *CHOICE,
    )
)


# Sums that metrics are computed from by a formula, and an attack's success: none of them is a metric by itself.
PARTS = frozenset(
    {need.partition(".")[0] for metric in KNOWN_METRICS.values() for need in metric.needs if need != metric.name}
    - KNOWN_METRICS.keys()
    | {"success"}
)


def is_higher_better(metric: str) -> bool:
    """Whether higher values of a metric are better; true of a metric that is not known here."""
    return KNOWN_METRICS[metric].higher if metric in KNOWN_METRICS else True


def is_possible(name: str, total: float, count: int) -> bool:
    """Whether a sum of this name over ``count`` rows can be ``total``."""
    name = name.partition(".")[0]  # without the label
    if name == "spearman":
        return -count <= total <= count
    return name not in SHARES or 0 <= total <= count


def moments(x: Sequence[float], y: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Return the sums for Pearson's correlation of predictions ``x`` with targets ``y``."""
    pairs = {"x": x, "y": y, "xx": [a * a for a in x], "yy": [b * b for b in y], "xy": [a * b for a, b in zip(x, y)]}
    return {name: (math.fsum(values), len(x)) for name, values in pairs.items()}


def spearman(x: Iterable[float], y: Iterable[float]) -> float:
    """Return the correlation of the ranks; equal values share a rank. 0 if one side is constant."""
    from scipy.stats import rankdata

    return _pearson(*moments(*(rankdata(values).tolist() for values in (x, y))).values())


def compute_metrics(scores: Scores) -> dict[str, float]:
    """Return every metric whose sums are there. A sum with a name of its own is a metric, too: its mean."""
    known = {
        name: metric.value(scores.sums)
        for name, metric in KNOWN_METRICS.items()
        if scores.sums.keys() >= set(metric.needs)
    }
    means = {name: x for name, x in scores.sums.items() if name.partition(".")[0] not in PARTS}
    return known | {name: total / count for name, (total, count) in means.items()}


def pool(scores: Iterable[Scores]) -> Scores:
    """Return the sums over several clients' rows."""
    sums: dict[str, tuple[float, int]] = {}
    for client in scores:
        for name, (total, count) in client.sums.items():
            before = sums.get(name, (0, 0))
            sums[name] = (before[0] + total, before[1] + count)
    return Scores(sums)
