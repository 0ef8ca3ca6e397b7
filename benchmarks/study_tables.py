"""Markdown of the studies' JSON lines: mean and deviation over seeds, a paired test against the first label."""

import argparse
import statistics
from collections.abc import Sequence
from math import isnan, nan
from typing import Any

from scipy.stats import spearmanr

from benchmarks.studies import STUDIES, Book, Study, best_rate
from fedlora.reporting.tables.comparison import PairedTest, compute_p_value
from fedlora.reporting.tables.comparison import compare_pairs as tested

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


def paired(study: Study, rows: Sequence[dict[str, Any]], label: str) -> PairedTest | None:
    """Against the first label over the same seeds and settings."""
    if label == study.labels[0]:
        return None
    one, other = (
        {(s, seed): x for s in study.settings for seed, x in values(rows, s, name).items()}
        for name in (label, study.labels[0])
    )
    return tested(one, other)


def compared(test: PairedTest, digits: int) -> str:
    """A paired test in words; no test can be made of differences that are all the same."""
    p = "the same every time" if isnan(test.p) else f"p = {test.p:.2g}"
    return f"{test.difference:+.{digits}f}, {p} (n = {test.pairs})"


def finished(name: str) -> list[dict[str, Any]]:
    """The runs at each label's best rate that ended."""
    study, book = STUDIES[name], Book.of(name)
    best = {label: best_rate(study, book, label) for label in study.labels}
    runs = [row for row in book.rows if row["phase"] == "run" and row["value"] is not None]
    return [row for row in runs if row["rate"] == best[row["label"]]]


def table(name: str) -> str:
    """One study's table."""
    study, book = STUDIES[name], Book.of(name)
    rows = finished(name)
    metric = next((row["metric"] for row in rows if row.get("metric")), "accuracy")
    digits = DIGITS.get(metric, 3)
    first = study.labels[0]
    head = ["", study.tuned.split(".")[-1].replace("_", " "), *(setting or metric for setting in study.settings)]
    head += [f"against {first} (paired)", "aggregation error", "MB up", "MB down"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label in study.labels:
        own = [row for row in rows if row["label"] == label]
        if not own:
            continue
        test = paired(study, rows, label)
        errors = [row["errors"]["served"] for row in own if "served" in row["errors"]]
        cells = [label, f"{best_rate(study, book, label):g}"]
        cells += [spread(list(values(rows, setting, label).values()), digits) for setting in study.settings]
        cells.append("–" if test is None else compared(test, digits))
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


def groups(name: str) -> str:
    """Accuracy by what clients can do, the weakest group first; empty where all are alike."""
    study, cells = STUDIES[name], {}
    for row in finished(name):
        for group in row["clients"].get("capability", []):
            key = row["setting"], row["label"], group["capability"]
            cells.setdefault(key, []).append(group["mean"])
    levels = sorted({level for *_, level in cells})
    lines = ["| profile | | " + " | ".join(f"{level:g}" for level in levels) + " |", "|---" * (len(levels) + 2) + "|"]
    for setting in study.settings:
        for label in study.labels:
            own = [spread(cells.get((setting, label, level), []), 3) for level in levels]
            lines.append("| " + " | ".join([setting, label, *own]) + " |")
    return "\n".join(lines) if cells else ""


def each(name: str) -> str:
    """The metric of every client; empty where it was not kept of every run."""
    rows, labels = finished(name), STUDIES[name].labels
    if not rows or not all("each" in row["clients"] for row in rows):
        return ""
    digits = DIGITS.get(rows[0]["metric"], 3)
    lines = ["| client | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for client in range(len(rows[0]["clients"]["each"])):
        own = [[row["clients"]["each"][client] for row in rows if row["label"] == label] for label in labels]
        lines.append(
            f"| {client} | " + " | ".join(spread([x for x in few if x is not None], digits) for few in own) + " |"
        )
    return "\n".join(lines)


def explained(name: str) -> str:
    """Whether methods of a smaller aggregation error do better: their rank correlation, run by run of one seed."""
    rows = [row for row in finished(name) if "served" in row["errors"]]
    found = []
    for key in sorted({(row["setting"], row["seed"]) for row in rows}):
        some = [row for row in rows if (row["setting"], row["seed"]) == key]
        good = [row["value"] if row["higher"] else -row["value"] for row in some]
        # Rounding is no difference: what is exact shares one rank.
        rho = spearmanr([round(row["errors"]["served"], 6) for row in some], good).statistic if len(some) > 2 else nan
        found += [] if isnan(rho) else [float(rho)]
    if len(found) < 2:
        return ""
    return (
        f"Rank correlation of error and goodness over methods: {spread(found, 2)} over {len(found)} federations "
        f"(-1: the smaller the error the better; p = {compute_p_value(found):.2g})."
    )


def main() -> None:
    """Prints the tables of the named studies."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", default=list(STUDIES), choices=[*STUDIES, []])
    for name in options.parse_args().names:
        more = [text for make in (explained, groups, each) if (text := make(name))]
        print("\n\n".join([f"### {name}", table(name), *more, "Trials on validation rows:", trials(name)]) + "\n")


if __name__ == "__main__":
    main()
