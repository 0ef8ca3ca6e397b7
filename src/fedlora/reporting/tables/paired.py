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


LEVEL = 0.05  # p (Holm) from which on a difference may be chance


@dataclass(frozen=True)
class Ranking:
    """Who is ahead by the mean, and whom the test does not tell from it; ``pairs`` are the fewest of any test."""

    first: Hashable
    mean: float
    level: tuple[Hashable, ...]  # nobody: ``first`` is the best
    pairs: int

    @property
    def said(self) -> str:
        """What the seeds say of ``first``, for a sentence."""
        if not self.level:
            return f"paired test over {self.pairs} seeds, p (Holm) < {LEVEL:g}"
        names = [str(name) for name in self.level]
        many = f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 4 else _listed(names)
        why = f"paired test over {self.pairs} seeds" if self.pairs > 1 else "one seed: no test"
        return f"level with {many}; {why}"


def ranking(values: Mapping[Hashable, Mapping[Hashable, float]], higher: bool) -> Ranking | None:
    """Of a name's figures by seed: who is ahead, and who is level with it. None of fewer than two names."""
    means = {name: statistics.fmean(own.values()) for name, own in values.items() if own}
    if len(means) < 2:
        return None
    first = (max if higher else min)(means, key=means.__getitem__)
    others = [name for name in means if name != first]
    found = {name: paired(values[first], values[name]) for name in others}
    ps = holm([one.p for one in found.values() if one is not None])
    told = dict(zip((name for name, one in found.items() if one is not None), ps))
    level = tuple(name for name in others if not told.get(name, 1.0) < LEVEL)  # NaN is no difference
    pairs = min((one.pairs if one is not None else 1) for one in found.values())
    return Ranking(first, means[first], level, pairs)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
