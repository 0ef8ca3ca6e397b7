"""Tables that compare: a row a run, a row a method, and Student's paired test over the seeds of two methods.

Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics 6, 1979.
"""

import math
import statistics
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fedlora.reporting.load import Run
from fedlora.reporting.tables.by_round import MODELS, RUN, get_metric
from fedlora.runs import comparison
from fedlora.runs.table import Column, Table, format_relative, group_by, mean_std

K = TypeVar("K", bound=Hashable)
FIGURES = ("global", "clients", "worst", "mb_up", "mb_down", "error", "seconds")
LEVEL = 0.05  # p (Holm) from which on a difference may be chance
MODEL_NAMES = {"global": "shared model", "clients": "clients' own models"}


def tabulate_comparison(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    """The rows of ``comparison.json``: mean ± standard deviation over seeds, and the verdict of the paired test."""
    by_capability = [_by_capability(rows)] if any("capability" in row for row in rows) else []
    return [
        comparison.comparison_table(rows),
        *by_capability,
        "global: the shared model on the global test rows. clients' own: what each client holds on its own test rows,\n"
        "mean over clients. aggregation error: served against the exact mean, relative, mean over weights and rounds.",
        *comparison.coverage_notes(rows),
        *([summarise(rows)] if rows else []),
    ]


def _by_capability(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The clients' own models, in groups by what the clients can do."""
    levels = sorted({group["capability"] for row in rows for group in row.get("capability", ())})
    table_rows = []
    for row in rows:
        groups = {f"{group['capability']:g}": group for group in row.get("capability", ())}
        cells = {level: f"{_mean_std(one['mean'])} ({_mean_std(one['worst'])})" for level, one in groups.items()}
        table_rows.append({"method": row["method"], **cells})
    columns = (Column("method", "method"), *(Column(f"{k:g}", f"{k:g}", align="right") for k in levels))
    return Table("capability", "Clients' own models by the clients' capability: mean (worst)", columns, table_rows)


def _mean_std(value: Mapping[str, float]) -> str:
    column = Column("mean", "", 3, "std")
    return Table("", "", (column,), []).text(value, column)


def summarise(rows: Sequence[Mapping[str, Any]]) -> str:
    """The best methods by the paired test, and the one that sends least, in a sentence or two."""
    clauses = [text for key, model in MODEL_NAMES.items() if (text := _ahead(rows, key, model))]
    sent = {row["method"]: row["mb_up"]["mean"] + row["mb_down"]["mean"] for row in rows if row["mb_up"]}
    if sent := {name: size for name, size in sent.items() if size > 0}:
        least = min(sent.values())
        names = [name for name, size in sent.items() if size == least]
        clauses.append(f"{' and '.join(names)} {'sends' if len(names) == 1 else 'send'} least ({least:.2f} MB)")
    seeds = max(len(row["seeds"]) for row in rows)
    note = "one seed: differences of a point or two may be chance" if seeds == 1 else f"{seeds} seeds"
    return "; ".join(clauses) + f" ({note})."


def _ahead(rows: Sequence[Mapping[str, Any]], key: str, model: str) -> str | None:
    """The best method where the paired test finds one; else those that are level with the one ahead."""
    there = [row for row in rows if row[key]]
    found = rank({row["method"]: row.get("by_seed", {}).get(key) or {0: row[key]["mean"]} for row in there},
                    bool(there) and there[0]["metric"]["higher"])  # fmt: skip
    if found is None:
        return None if not there else f"{model}: {there[0][key]['mean']:.3f} ({there[0]['method']})"
    verb = "best with" if not found.level else "no winner, ahead by the mean is"
    return f"{model}: {verb} {found.first} ({found.mean:.3f}; {found.verdict})"


def tabulate_oracle(rows: Sequence[Mapping[str, Any]], uploads: Mapping[str, float]) -> list[Table | str]:
    """What each method would have served of one run's uploads."""
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
    """A run's figures at its last evaluated round, and sums and means over its rounds."""
    scored = next((row for row in reversed(run.digest.rounds) if row["clients"] is not None), {})
    sums = {d: sum(mb for (way, _), mb in run.digest.bytes.items() if way == d) for d in ("up", "down")}
    error = mean_std(row["served"] for row in run.digest.rounds)
    return {
        **{key: scored.get(key) for key in ("global", "clients", "worst")},
        "mb_up": sums["up"], "mb_down": sums["down"], "error": None if error is None else error.mean,
        "seconds": run.digest.seconds,
    }  # fmt: skip


def tabulate_runs(runs: Sequence[Run]) -> Table:
    """A row a run."""
    rows = []
    for run in runs:
        epsilon = next((row["epsilon"] for row in reversed(run.digest.rounds) if row["epsilon"] is not None), None)
        said = {"label": run.label, "run": run.name, "seed": run.seed, "state": run.state}
        count = run.digest.counted
        done = {"rounds": len(run.digest.rounds), "epsilon": epsilon, "bad": count.get("quarantined", 0)}
        done |= {"away": count.get("absent", 0), "over": describe_coverage(run)}
        rows.append({**said, **done, **get_final(run)})
    figures = (replace(column, spread=None) for column in comparison.figure_columns(get_metric(runs), True))
    columns = (RUN, Column("run", "folder"), Column("seed", "seed", 0), Column("state", "state"),
               Column("rounds", "rounds", 0), *figures,
               *([Column("epsilon", "ε", 3)] if any(row["epsilon"] is not None for row in rows) else []),
               *([Column("bad", "quarantined", 0)] if any(row["bad"] for row in rows) else []),
               *([Column("away", "turns missed", 0)] if any(row["away"] for row in rows) else []),
               *([Column("over", "own figures over")] if {row["over"] for row in rows} - {"all"} else []))  # fmt: skip
    return Table("runs", "Runs", columns, rows, "Figures of the last evaluated round, never of the best one.")


def describe_coverage(run: Run) -> str:
    """The clients that the means of the last evaluated round are over: ``all``, or ``2 of 3 clients``."""
    scored = next((row["scored"] for row in reversed(run.digest.rounds) if row["scored"] is not None), 0)
    return "all" if scored == run.digest.of else f"{scored} of {run.digest.of} clients"


def tabulate_by_method(runs: Sequence[Run]) -> Table:
    """A row a label: mean and sample standard deviation over its seeds. Runs that diverged count in no figure."""
    rows = []
    for label, own in group_by(runs, lambda run: run.label).items():
        finals = [get_final(run) for run in own if run.failure is None]
        row = {"method": label, "seeds": [run.seed for run in own], "diverged": len(own) - len(finals)}
        row |= {"metric": {"name": runs[0].metric}, "over": any(describe_coverage(run) != "all" for run in own)}
        rows.append(row | {key: comparison.mean_std_table(one[key] for one in finals) for key in FIGURES})
    note = (
        "Mean ± sample standard deviation over seeds, of the last evaluated round. Errors: served against the exact "
        "mean, relative, over weights and rounds."
    )
    few = [f"{run.name}: {who}" for run in runs if (who := describe_coverage(run)) != "all"]
    note += f" Clients' own figures are not over all clients (*) in {'; '.join(few)}." if few else ""
    return replace(comparison.comparison_table(rows, is_detailed=True), title="Methods", note=note)


def tabulate_tests(runs: Sequence[Run]) -> Table:
    """Every label against the first, by Student's paired test over the seeds that both have, corrected by Holm."""
    rows = []
    for model in MODELS:
        found = {label: _by_seed(own, model) for label, own in group_by(runs, lambda run: run.label).items()}
        found = {label: values for label, values in found.items() if values}
        if not found:
            continue
        first, *others = found
        made = [(label, test) for label in others if (test := compare_pairs(found[label], found[first])) is not None]
        for (label, test), p in zip(made, correct_holm([test.p for _, test in made])):
            row = {"label": label, "against": first, "model": MODELS[model], "difference": test.difference}
            rows.append({**row, "p": _number(test.p), "holm": _number(p), "pairs": test.pairs})
    columns = (RUN, Column("against", "against"), Column("model", "model"), Column("difference", "mean difference", 4),
               Column("p", "p", 4), Column("holm", "p (Holm)", 4), Column("pairs", "seeds", 0))  # fmt: skip
    note = "Student's paired test over seeds, two-sided; p (Holm) is corrected for the number of tests of one model."
    return Table("tests", "Paired tests", columns, rows, note)


def _by_seed(runs: Sequence[Run], model: str) -> Mapping[int, float]:
    found = {run.seed: get_final(run)[model] for run in runs if run.failure is None}
    return {seed: value for seed, value in found.items() if value is not None}


def _number(p: float) -> float | None:
    return None if math.isnan(p) else p


@dataclass(frozen=True)
class PairedTest:
    """One against another over the same pairs."""

    difference: float  # mean of one less the other
    p: float  # two-sided; NaN where all differences are alike
    pairs: int


def compare_pairs(one: Mapping[K, float], other: Mapping[K, float]) -> PairedTest | None:
    """Student's paired test over the keys that both have; None of fewer than two pairs."""
    differences = [one[key] - other[key] for key in one if key in other]
    if len(differences) < 2:
        return None
    return PairedTest(statistics.fmean(differences), compute_p_value(differences), len(differences))


def compute_p_value(differences: Sequence[float]) -> float:
    """Student's test of a mean of zero, two-sided."""
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences that are all alike: it is then 0 or NaN, and shown
        return float(ttest_1samp(differences, 0).pvalue)


def correct_holm(ps: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected for their number; NaN is no test and stays."""
    real = sorted((p, i) for i, p in enumerate(ps) if p == p)
    found, least = list(ps), 0.0
    for place, (p, i) in enumerate(real):
        least = found[i] = max(least, min(1.0, p * (len(real) - place)))
    return found


@dataclass(frozen=True)
class Ranking:
    """Who is ahead by the mean, and whom the test does not tell from it; ``pairs`` are the fewest of any test."""

    first: Hashable
    mean: float
    level: tuple[Hashable, ...]  # nobody: ``first`` is the best
    pairs: int

    @property
    def verdict(self) -> str:
        """The verdict of the paired test on ``first``, for a sentence."""
        if not self.level:
            return f"paired test over {self.pairs} seeds, p (Holm) < {LEVEL:g}"
        names = [str(name) for name in self.level]
        many = f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 4 else _listed(names)
        why = f"paired test over {self.pairs} seeds" if self.pairs > 1 else "one seed: no test"
        return f"level with {many}; {why}"


def rank(values: Mapping[Hashable, Mapping[Hashable, float]], higher: bool) -> Ranking | None:
    """Of a name's figures by seed: who is ahead, and who is level with it. None of fewer than two names."""
    means = {name: statistics.fmean(own.values()) for name, own in values.items() if own}
    if len(means) < 2:
        return None
    first = (max if higher else min)(means, key=means.__getitem__)
    others = [name for name in means if name != first]
    found = {name: compare_pairs(values[first], values[name]) for name in others}
    ps = correct_holm([one.p for one in found.values() if one is not None])
    p_values = dict(zip((name for name, one in found.items() if one is not None), ps))
    level = tuple(name for name in others if not p_values.get(name, 1.0) < LEVEL)  # NaN is no difference
    pairs = min((one.pairs if one is not None else 1) for one in found.values())
    return Ranking(first, means[first], level, pairs)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
