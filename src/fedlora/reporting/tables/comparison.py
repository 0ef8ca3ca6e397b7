"""Tables that compare: a row a run, a row a method, and paired tests between methods."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.reporting.load import Run
from fedlora.reporting.table import Column, Table, grouped, over
from fedlora.reporting.tables.by_round import MODELS, RUN, metric_of
from fedlora.reporting.tables.paired import holm, paired

FIGURES = ("global", "clients", "worst", "mb_up", "mb_down", "error", "seconds")


def final(run: Run) -> dict[str, float | None]:
    """A run's figures at its last evaluated round, and sums and means over its rounds."""
    scored = next((row for row in reversed(run.digest.rounds) if row["clients"] is not None), {})
    sums = {d: sum(mb for (way, _), mb in run.digest.bytes.items() if way == d) for d in ("up", "down")}
    error = over(row["served"] for row in run.digest.rounds)
    return {
        **{key: scored.get(key) for key in ("global", "clients", "worst")},
        "mb_up": sums["up"], "mb_down": sums["down"], "error": None if error is None else error.mean,
        "seconds": run.digest.seconds,
    }  # fmt: skip


def _columns(runs: Sequence[Run], spread: bool) -> tuple[Column, ...]:
    titles = {
        "global": (f"global {metric_of(runs)}", 4), "clients": (f"clients' own {metric_of(runs)}", 4),
        "worst": ("worst client", 4), "mb_up": ("MB up", 2), "mb_down": ("MB down", 2),
        "error": ("aggregation error", 4), "seconds": ("seconds", 1),
    }  # fmt: skip
    return tuple(Column(key, title, n, f"{key}_std" if spread else None) for key, (title, n) in titles.items())


def one_by_one(runs: Sequence[Run]) -> Table:
    """A row a run."""
    rows = []
    for run in runs:
        epsilon = next((row["epsilon"] for row in reversed(run.digest.rounds) if row["epsilon"] is not None), None)
        said = {"label": run.label, "run": run.name, "seed": run.seed, "state": run.state}
        count = run.digest.counted
        done = {"rounds": len(run.digest.rounds), "epsilon": epsilon, "bad": count.get("quarantined", 0)}
        done |= {"away": count.get("absent", 0), "over": whom(run)}
        rows.append({**said, **done, **final(run)})
    columns = (RUN, Column("run", "folder"), Column("seed", "seed", 0), Column("state", "state"),
               Column("rounds", "rounds", 0), *_columns(runs, False),
               *([Column("epsilon", "ε", 3)] if any(row["epsilon"] is not None for row in rows) else []),
               *([Column("bad", "quarantined", 0)] if any(row["bad"] for row in rows) else []),
               *([Column("away", "turns missed", 0)] if any(row["away"] for row in rows) else []),
               *([Column("over", "own figures over")] if {row["over"] for row in rows} - {"all"} else []))  # fmt: skip
    return Table("runs", "Runs", columns, rows, "Figures of the last evaluated round, never of the best one.")


def whom(run: Run) -> str:
    """Whom the mean over clients of the last evaluated round is over: ``all``, or ``2 of 3 clients``."""
    scored = sum(value is not None for value in run.digest.each)
    return "all" if scored == run.digest.of else f"{scored} of {run.digest.of} clients"


def methods(runs: Sequence[Run]) -> Table:
    """A row a label: mean and sample standard deviation over its seeds. Runs that diverged count in no figure."""
    rows: list[dict[str, Any]] = []
    for label, own in grouped(runs, lambda run: run.label).items():
        finals = [final(run) for run in own if run.failure is None]
        row: dict[str, Any] = {"label": label, "seeds": len(finals), "diverged": len(own) - len(finals)}
        for key in FIGURES:
            found = over(one[key] for one in finals)
            row |= {} if found is None else {key: found.mean, f"{key}_std": found.std}
        rows.append(row)
    lost = [Column("diverged", "diverged", 0)] if any(row["diverged"] for row in rows) else []
    columns = (RUN, Column("seeds", "seeds", 0), *lost, *_columns(runs, True))
    note = (
        "Mean ± sample standard deviation over seeds, of the last evaluated round. Errors: served against the exact "
        "mean, relative, over weights and rounds."
    )
    few = [f"{run.name}: {who}" for run in runs if (who := whom(run)) != "all"]
    note += f" Clients' own figures are not over all clients in {'; '.join(few)}." if few else ""
    return Table("methods", "Methods", columns, rows, note)


def tests(runs: Sequence[Run]) -> Table:
    """Every label against the first, by Student's paired test over the seeds that both have, corrected by Holm."""
    rows = []
    for model in MODELS:
        found = {label: _by_seed(own, model) for label, own in grouped(runs, lambda run: run.label).items()}
        found = {label: values for label, values in found.items() if values}
        if not found:
            continue
        first, *others = found
        made = [(label, test) for label in others if (test := paired(found[label], found[first])) is not None]
        for (label, test), p in zip(made, holm([test.p for _, test in made])):
            row = {"label": label, "against": first, "model": MODELS[model], "difference": test.difference}
            rows.append({**row, "p": _number(test.p), "holm": _number(p), "pairs": test.pairs})
    columns = (RUN, Column("against", "against"), Column("model", "model"), Column("difference", "mean difference", 4),
               Column("p", "p", 4), Column("holm", "p (Holm)", 4), Column("pairs", "seeds", 0))  # fmt: skip
    note = "Student's paired test over seeds, two-sided; p (Holm) is corrected for the number of tests of one model."
    return Table("tests", "Paired tests", columns, rows, note)


def _by_seed(runs: Sequence[Run], model: str) -> Mapping[int, float]:
    found = {run.seed: final(run)[model] for run in runs if run.failure is None}
    return {seed: value for seed, value in found.items() if value is not None}


def _number(p: float) -> float | None:
    return None if math.isnan(p) else p
