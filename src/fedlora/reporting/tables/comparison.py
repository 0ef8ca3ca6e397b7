"""Tables that compare runs and methods, with Student's paired test over the seeds of two methods.

Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics 6, 1979.
"""

import statistics
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fedlora.reporting.digest import to_finite
from fedlora.reporting.load import Run
from fedlora.reporting.tables.by_round import MODELS, RUN, get_metric
from fedlora.runs import comparison
from fedlora.runs.table import Column, Table, format_relative, group_by, mean_std

K = TypeVar("K", bound=Hashable)
FIGURES = ("global", "clients", "worst", "mb_up", "mb_down", "error", "seconds")
LEVEL = 0.05  # a difference with a larger p (Holm) may be chance


def tabulate_comparison(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    """Build the tables of ``comparison.json``: means over seeds, and the verdict of the paired test."""
    return [
        comparison.comparison_table(rows),
        *([_tabulate_capability(rows)] if any("capability" in row for row in rows) else []),
        "global: the shared model on the global test rows. clients' own: what each client holds on its own test rows,\n"
        "mean over clients. aggregation error: served against the exact mean, relative, mean over weights and rounds.",
        *comparison.coverage_notes(rows),
        *([summarise_comparison(rows)] if rows else []),
    ]


def _tabulate_capability(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of the clients' own models, grouped by the clients' capability."""
    mean = Column("mean", "", 3, "std")
    levels = sorted({group["capability"] for row in rows for group in row.get("capability", ())})
    table_rows = []
    for row in rows:
        cells = {f"{group['capability']:g}": f"{mean.text(group['mean'])} ({mean.text(group['worst'])})"
                 for group in row.get("capability", ())}  # fmt: skip
        table_rows.append({"method": row["method"], **cells})
    columns = (Column("method", "method"), *(Column(f"{k:g}", f"{k:g}", align="right") for k in levels))
    return Table("capability", "Clients' own models by the clients' capability: mean (worst)", columns, table_rows)


def summarise_comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Name the best methods by the paired test, and those that send least."""
    models = {"global": "shared model", "clients": "clients' own models"}
    clauses = [text for key, model in models.items() if (text := _describe_best(rows, key, model))]
    sent = {row["method"]: row["mb_up"]["mean"] + row["mb_down"]["mean"] for row in rows if row["mb_up"]}
    if sent := {name: size for name, size in sent.items() if size > 0}:
        least = min(sent.values())
        names = [name for name, size in sent.items() if size == least]
        clauses.append(f"{' and '.join(names)} {'sends' if len(names) == 1 else 'send'} least ({least:.2f} MB)")
    seeds = max(len(row["seeds"]) for row in rows)
    note = "one seed: differences of a point or two may be chance" if seeds == 1 else f"{seeds} seeds"
    return "; ".join(clauses) + f" ({note})."


def _describe_best(rows: Sequence[Mapping[str, Any]], key: str, model: str) -> str | None:
    """Name the best method by the paired test, or the first by the mean and those level with it."""
    scored = [row for row in rows if row[key]]
    if not scored:
        return None
    values = {row["method"]: row.get("by_seed", {}).get(key) or {0: row[key]["mean"]} for row in scored}
    best = rank(values, scored[0]["metric"]["higher"])
    if best is None:
        return f"{model}: {scored[0][key]['mean']:.3f} ({scored[0]['method']})"
    verb = "best with" if not best.level else "no winner, ahead by the mean is"
    return f"{model}: {verb} {best.first} ({best.mean:.3f}; {best.verdict})"


def tabulate_oracle(rows: Sequence[Mapping[str, Any]], uploads: Mapping[str, float]) -> list[Table | str]:
    """Build the table of the aggregates of one run's uploads under each method."""
    titles = {"error": "error, mean", "first": "first round", "last": "last round", "gauge": "factors moved"}
    table_rows = [
        {"method": row["method"], **{key: format_relative(row[key]) for key in titles}}
        for row in sorted(rows, key=lambda row: row["error"])
    ]
    columns = (Column("method", "method"), *(Column(key, title, align="right") for key, title in titles.items()))
    title = "The same uploads under every method: served against the exact mean, relative"
    angles = "; ".join(f"{name} {value:.0f} degrees" for name, value in uploads.items() if name != "tail")
    between = f"; between clients, {angles}" if angles else ""
    return [
        Table("oracle", title, columns, table_rows),
        "factors moved: how far the served A and B lie from the clients' means, relative to these.",
        f"of the uploads: {uploads['tail']:.1e} of the energy lies beyond the rank{between}.",
    ]


def get_final(run: Run) -> dict[str, float | None]:
    """Return a run's figures at its last evaluated round, and sums and means over its rounds."""
    scored = next((row for row in reversed(run.digest.rounds) if row["clients"] is not None), {})
    error = mean_std(row["served"] for row in run.digest.rounds)
    return {
        **{key: scored.get(key) for key in ("global", "clients", "worst")},
        **{f"mb_{d}": sum(mb for (way, _), mb in run.digest.bytes.items() if way == d) for d in ("up", "down")},
        "error": None if error is None else error.mean, "seconds": run.digest.seconds,
    }  # fmt: skip


def group_figures(runs: Sequence[Run], key: str) -> dict[str, dict[int, float]]:
    """Return label -> seed -> a final figure, without the runs that diverged or have no such figure."""
    figures = {
        label: {run.seed: x for run in group if run.failure is None and (x := get_final(run)[key]) is not None}
        for label, group in group_by(runs, lambda run: run.label).items()
    }
    return {label: by_seed for label, by_seed in figures.items() if by_seed}


def tabulate_runs(runs: Sequence[Run]) -> Table:
    """Build the table of all runs."""
    rows = []
    for run in runs:
        epsilon = next((row["epsilon"] for row in reversed(run.digest.rounds) if row["epsilon"] is not None), None)
        counts = run.digest.counted
        row = {"label": run.label, "run": run.name, "seed": run.seed, "state": run.state}
        row |= {"rounds": len(run.digest.rounds), "epsilon": epsilon, "bad": counts.get("quarantined", 0)}
        rows.append({**row, "away": counts.get("absent", 0), "over": describe_coverage(run), **get_final(run)})
    figures = (replace(column, spread=None) for column in comparison.figure_columns(get_metric(runs), True))
    columns = (RUN, Column("run", "folder"), Column("seed", "seed", 0), Column("state", "state"),
               Column("rounds", "rounds", 0), *figures,
               *([Column("epsilon", "ε", 3)] if any(row["epsilon"] is not None for row in rows) else []),
               *([Column("bad", "quarantined", 0)] if any(row["bad"] for row in rows) else []),
               *([Column("away", "turns missed", 0)] if any(row["away"] for row in rows) else []),
               *([Column("over", "own figures over")] if {row["over"] for row in rows} - {"all"} else []))  # fmt: skip
    return Table("runs", "Runs", columns, rows, "Figures of the last evaluated round, never of the best one.")


def describe_coverage(run: Run) -> str:
    """Return the clients that the means of the last evaluated round are over: ``all``, or ``2 of 3 clients``."""
    scored = next((row["scored"] for row in reversed(run.digest.rounds) if row["scored"] is not None), 0)
    return "all" if scored == run.digest.of else f"{scored} of {run.digest.of} clients"


def tabulate_by_method(runs: Sequence[Run]) -> Table:
    """Build the table of means and sample standard deviations over seeds, without the runs that diverged."""
    rows = []
    for label, group in group_by(runs, lambda run: run.label).items():
        finals = [get_final(run) for run in group if run.failure is None]
        row = {"method": label, "seeds": [run.seed for run in group], "diverged": len(group) - len(finals)}
        row |= {"metric": {"name": runs[0].metric}, "over": any(describe_coverage(run) != "all" for run in group)}
        rows.append(row | {key: comparison.mean_std_table(final[key] for final in finals) for key in FIGURES})
    note = (
        "Mean ± sample standard deviation over seeds, of the last evaluated round. Errors: served against the exact "
        "mean, relative, over weights and rounds."
    )
    few = [f"{run.name}: {who}" for run in runs if (who := describe_coverage(run)) != "all"]
    note += f" Clients' own figures are not over all clients (*) in {'; '.join(few)}." if few else ""
    return replace(comparison.comparison_table(rows, is_detailed=True), title="Methods", note=note)


def tabulate_tests(runs: Sequence[Run]) -> Table:
    """Build the table of Student's paired tests of every label against the first, corrected by Holm."""
    rows = []
    for model in MODELS:
        by_label = group_figures(runs, model)
        first, *others = by_label or [""]
        tests = {label: test for label in others if (test := compare_pairs(by_label[label], by_label[first]))}
        for (label, test), p in zip(tests.items(), correct_holm([test.p for test in tests.values()])):
            row = {"label": label, "against": first, "model": MODELS[model], "difference": test.difference}
            rows.append({**row, "p": to_finite(test.p), "holm": to_finite(p), "pairs": test.pairs})
    columns = (RUN, Column("against", "against"), Column("model", "model"), Column("difference", "mean difference", 4),
               Column("p", "p", 4), Column("holm", "p (Holm)", 4), Column("pairs", "seeds", 0))  # fmt: skip
    note = "Student's paired test over seeds, two-sided; p (Holm) is corrected for the number of tests of one model."
    return Table("tests", "Paired tests", columns, rows, note)


@dataclass(frozen=True)
class PairedTest:
    """The result of a paired test."""

    difference: float  # mean of the first minus the second
    p: float  # two-sided; NaN if all differences are equal
    pairs: int


def compare_pairs(one: Mapping[K, float], other: Mapping[K, float]) -> PairedTest | None:
    """Apply Student's paired test over the common keys; None for fewer than two pairs."""
    differences = [one[key] - other[key] for key in one if key in other]
    if len(differences) < 2:
        return None
    return PairedTest(statistics.fmean(differences), compute_p_value(differences), len(differences))


def compute_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's test of a mean of zero."""
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for equal differences, whose p-value is 0 or NaN
        return float(ttest_1samp(differences, 0).pvalue)


def correct_holm(ps: Sequence[float]) -> list[float]:
    """Correct the p-values of several tests for their number; NaN counts as no test and stays."""
    real = sorted((p, i) for i, p in enumerate(ps) if p == p)
    corrected, least = list(ps), 0.0
    for place, (p, i) in enumerate(real):
        least = corrected[i] = max(least, min(1.0, p * (len(real) - place)))
    return corrected


@dataclass(frozen=True)
class Ranking:
    """The name with the best mean, and the names that no test separates from it."""

    first: Hashable
    mean: float
    level: tuple[Hashable, ...]  # empty: ``first`` is the best
    pairs: int  # the fewest of any test

    @property
    def verdict(self) -> str:
        """The verdict of the paired test on ``first``, as part of a sentence."""
        if not self.level:
            return f"paired test over {self.pairs} seeds, p (Holm) < {LEVEL:g}"
        names = [str(name) for name in self.level]
        many = f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 4 else join_names(names)
        why = f"paired test over {self.pairs} seeds" if self.pairs > 1 else "one seed: no test"
        return f"level with {many}; {why}"


def rank(values: Mapping[Hashable, Mapping[Hashable, float]], higher: bool) -> Ranking | None:
    """Rank names by their figures, name -> seed -> figure; None for fewer than two names."""
    means = {name: statistics.fmean(own.values()) for name, own in values.items() if own}
    if len(means) < 2:
        return None
    first = (max if higher else min)(means, key=means.__getitem__)
    others = [name for name in means if name != first]
    tests = {name: compare_pairs(values[first], values[name]) for name in others}
    ps = correct_holm([test.p for test in tests.values() if test is not None])
    p_values = dict(zip((name for name, test in tests.items() if test is not None), ps))
    level = tuple(name for name in others if not p_values.get(name, 1.0) < LEVEL)  # NaN means no difference
    pairs = min(test.pairs if test is not None else 1 for test in tests.values())
    return Ranking(first, means[first], level, pairs)


def join_names(names: Sequence[str], most: int = 12) -> str:
    """Join names with commas and "and"; of more than ``most``, the first ones and the number of the others."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
