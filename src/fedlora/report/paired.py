"""Whether two methods differ: Student's paired test over the seeds that both were run with.

Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics 6, 1979.
"""

import statistics
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Paired:
    """One against another over the same pairs."""

    difference: float  # mean of one less the other
    p: float  # two-sided; NaN where all differences are alike
    pairs: int


def paired(one: Mapping[K, float], other: Mapping[K, float]) -> Paired | None:
    """Student's paired test over the keys that both have; None of fewer than two pairs."""
    differences = [one[key] - other[key] for key in one if key in other]
    if len(differences) < 2:
        return None
    return Paired(statistics.fmean(differences), p_value(differences), len(differences))


def p_value(differences: Sequence[float]) -> float:
    """Student's test of a mean of zero, two-sided."""
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences that are all alike: it is then 0 or NaN, and shown
        return float(ttest_1samp(differences, 0).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected for their number; NaN is no test and stays."""
    real = sorted((p, i) for i, p in enumerate(ps) if p == p)
    found, least = list(ps), 0.0
    for place, (p, i) in enumerate(real):
        least = found[i] = max(least, min(1.0, p * (len(real) - place)))
    return found
