"""Markdown of the studies' JSON lines: mean and deviation over seeds, a paired test against the first label."""

import argparse
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

from scipy.stats import ttest_rel

from benchmarks.studies import STUDIES, Book, Study, best_rate

DIGITS = {"perplexity": 2}


def values(rows: Sequence[dict[str, Any]], setting: str, label: str) -> dict[int, float]:
    """Seed -> the metric at the end."""
    found = {row["seed"]: row["value"] for row in rows if (row["setting"], row["label"]) == (setting, label)}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def spread(found: Sequence[float], digits: int) -> str:
    """``mean ± sample standard deviation``."""
    if not found:
        return "–"
    text = f"{statistics.fmean(found):.{digits}f}"
    return text if len(found) < 2 else f"{text} ± {statistics.stdev(found):.{digits}f}"


def paired(study: Study, rows: Sequence[dict[str, Any]], label: str) -> tuple[float, float, int] | None:
    """Mean difference to the first label over the same seeds and settings, its p-value, and how many pairs."""
    pairs = []
    for setting in study.settings:
        one, other = values(rows, setting, label), values(rows, setting, study.labels[0])
        pairs += [(one[seed], other[seed]) for seed in one.keys() & other.keys()]
    if len(pairs) < 2 or label == study.labels[0]:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences that are all alike: the p-value is then 0 or NaN, and shown
        p = float(ttest_rel(*zip(*pairs)).pvalue)
    return statistics.fmean(a - b for a, b in pairs), p, len(pairs)


def table(name: str) -> str:
    """One study's table."""
    study, book = STUDIES[name], Book.of(name)
    rows = [row for row in book.rows if row["phase"] == "run"]
    metric = next((row["metric"] for row in rows if row.get("metric")), "accuracy")
    digits = DIGITS.get(metric, 3)
    first = study.labels[0]
    head = ["", "learning rate", *(setting or metric for setting in study.settings)]
    head += [f"against {first} (paired)", "aggregation error", "MB up", "MB down"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label in study.labels:
        own = [row for row in rows if row["label"] == label and row["value"] is not None]
        if not own:
            continue
        test = paired(study, rows, label)
        errors = [row["errors"]["served"] for row in own if "served" in row["errors"]]
        cells = [label, f"{best_rate(study, book, label):g}"]
        cells += [spread(list(values(rows, setting, label).values()), digits) for setting in study.settings]
        cells.append("–" if test is None else f"{test[0]:+.{digits}f}, p = {test[1]:.2g} (n = {test[2]})")
        cells.append(f"{statistics.fmean(errors):.3f}" if errors else "–")
        cells += [f"{statistics.fmean(row['bytes'][d] for row in own) / 1e6:.2f}" for d in ("up", "down")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trials(name: str) -> str:
    """What each rate came to on the validation rows."""
    study, book = STUDIES[name], Book.of(name)
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in study.rates) + " |", "|---" * (len(study.rates) + 1) + "|"]
    for label in study.labels:
        found = [book.find(phase="trial", label=label, rate=rate) for rate in study.rates]
        cells = ["–" if row is None else "diverged" if row["value"] is None else f"{row['value']:.3f}" for row in found]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables of the named studies."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", default=list(STUDIES), choices=[*STUDIES, []])
    for name in options.parse_args().names:
        print(f"### {name}\n\n{table(name)}\n\nTrials on validation rows:\n\n{trials(name)}\n")


if __name__ == "__main__":
    main()
