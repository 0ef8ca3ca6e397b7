"""Tables over rounds: scores, errors, drift, cosine similarity and epsilon. Each row is a mean over seeds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from fedlora.reporting.digest import ERRORS
from fedlora.reporting.load import Run
from fedlora.runs.table import Column, Table, group_by, mean_std

MODELS = {"global": "shared model, global test rows", "clients": "clients' own models, own test rows"}
MEASURES = {"served": "as served", "fedit": "FedIT on the same uploads", "best": "the best of this rank"}
ROUND, SEEDS = Column("round", "round", 0), Column("seeds", "seeds", 0)
RUN = Column("label", "method")

Read = Callable[[Mapping[str, Any]], float | None]


def get_metric(runs: Sequence[Run]) -> str:
    """Return the name of the runs' metric for display."""
    return runs[0].metric.replace("_", " ")


def average_by_round(runs: Sequence[Run], read: Read, value: str) -> Iterator[dict[str, Any]]:
    """Yield a row by label and round: a figure's mean, ``low`` and ``high`` (a standard deviation away), ``seeds``.

    ``mb`` and ``seconds`` are the bytes and the time until then, as means over the same seeds.
    """
    for label, group in group_by(runs, lambda run: run.label).items():
        rounds = group_by((row for run in group for row in run.digest.rounds), lambda row: int(row["round"]))
        for round, rows in sorted(rounds.items()):
            rows = [row for row in rows if read(row) is not None]
            mean = mean_std(map(read, rows))
            if mean is None:
                continue
            ends = {"low": mean.mean - mean.std, "high": mean.mean + mean.std, "seeds": mean.n}
            until = {key: sum(row[key] for row in rows) / len(rows) for key in ("mb", "seconds")}
            scored = [row["scored"] for row in rows]
            fewest = {} if None in scored else {"scored": min(scored)}
            yield {"label": label, "round": round, value: mean.mean, **ends, **until, **fewest}


def _average_each(runs: Sequence[Run], value: str, key: str, reads: Mapping[str, Read]) -> list[dict[str, Any]]:
    """Average several figures by round; each row has the figure's name at ``key``."""
    return [{**row, key: name} for name, read in reads.items() for row in average_by_round(runs, read, value)]


def tabulate_curves(runs: Sequence[Run]) -> Table:
    """Build the table of the metric by round, megabyte and second."""
    rows = _average_each(runs, "value", "model", {model: itemgetter(model) for model in MODELS})
    missing = describe_missing(runs)
    columns = (RUN, Column("model", "model"), ROUND, Column("mb", "MB sent and received", 3),
               Column("seconds", "seconds", 1), Column("value", get_metric(runs), 4),
               Column("low", "less a standard deviation", 4), Column("high", "more a standard deviation", 4),
               SEEDS, *([Column("scored", "clients scored", 0)] if missing else []))  # fmt: skip
    note = "global: the shared model on the global test rows; clients: each on its own test rows, mean over clients."
    return Table("curves", f"{get_metric(runs).capitalize()} by round", columns, rows, note + missing)


def describe_missing(runs: Sequence[Run], most: int = 6) -> str:
    """Name the runs and rounds whose means over clients are not over all clients; empty if there are none."""
    texts = [f"{run.name}: {text}" for run in runs if (text := run.digest.means)]
    more = [f"{len(texts) - most} more runs"] if len(texts) > most else []
    return f" Not over all clients: {'; '.join([*texts[:most], *more])}." if texts else ""


def tabulate_errors(runs: Sequence[Run]) -> Table:
    """Build the table of aggregation errors by round, with those of FedIT and of the best approximation of the rank."""
    rows = _average_each(runs, "error", "measure", {MEASURES[name]: itemgetter(name) for name in ERRORS})
    columns = (RUN, Column("measure", "what"), ROUND, Column("error", "relative error", 5), SEEDS)
    note = "‖served − exact mean‖ / ‖exact mean‖, mean over the adapted weights and over seeds."
    return Table("errors", "Aggregation error by round", columns, rows, note)


def tabulate_oracle_by_round(runs: Sequence[Run]) -> Table:
    """Build the table of every method's error on the same uploads (``fedlora compare --oracle``)."""
    names = dict.fromkeys(name for run in runs for row in run.digest.rounds for name in row["oracle"])
    several = len({run.label for run in runs if any(row["oracle"] for row in run.digest.rounds)}) > 1
    rows = [
        {**row, "run": row["label"], "label": f"{name}, uploads of {row['label']}" if several else name}
        for name in names
        for row in average_by_round(runs, lambda row, n=name: row["oracle"].get(n), "error")  # type: ignore[misc]
    ]
    columns = (Column("run", "uploads of"), RUN, ROUND, Column("error", "relative error", 5), SEEDS)
    note = "‖served − exact mean‖ / ‖exact mean‖ over all adapted weights, of one run's uploads under every method."
    return Table("oracle", "Aggregation error of each method on the same uploads", columns, rows, note)


def tabulate_drift(runs: Sequence[Run]) -> Table:
    """Build the table of the distances of the clients' weights from their mean."""
    rows = list(average_by_round(runs, itemgetter("drift"), "drift"))
    columns = (RUN, ROUND, Column("drift", "client drift", 4), SEEDS)
    note = "√(Σ w ‖client − mean‖²) / ‖mean‖ of the clients' updates, mean over the adapted weights."
    return Table("drift", "Client drift by round", columns, rows, note)


def tabulate_cosines(runs: Sequence[Run]) -> Table:
    """Build the table of the cosine similarity of the clients' A and B."""
    rows = _average_each(runs, "cosine", "factor", {leaf: itemgetter(f"cosine {leaf}") for leaf in "AB"})
    columns = (RUN, Column("factor", "factor"), ROUND, Column("cosine", "cosine", 4), SEEDS)
    note = "Cosine of two clients' factors at the end of their turns, mean over pairs of clients and adapted weights."
    return Table("cosine", "Cosine similarity of the clients' A and B", columns, rows, note)


def tabulate_epsilon(runs: Sequence[Run]) -> Table:
    """Build the table of the privacy budget spent by round."""
    rows = list(average_by_round(runs, itemgetter("epsilon"), "epsilon"))
    columns = (RUN, ROUND, Column("epsilon", "ε", 3), SEEDS)
    deltas = sorted({row["delta"] for run in runs for row in run.digest.rounds if row["delta"] is not None})
    delta = f" at δ = {' and '.join(f'{x:.2g}' for x in deltas)}" if deltas else ""
    return Table("epsilon", "Privacy spent by round", columns, rows, f"ε of the worst client{delta}, after each round.")


def tabulate_layers(runs: Sequence[Run]) -> Table:
    """Build the table of the served error of each adapted weight, over stretches of rounds."""
    rows = []
    for label, group in group_by(runs, lambda run: run.label).items():
        pairs = (
            (part, start, pair)
            for run in group
            for part, bins in run.digest.layers.items()
            for start, pair in bins.items()
        )
        last = max((row["round"] for run in group for row in run.digest.rounds), default=0)
        for (part, start), same in group_by(pairs, lambda item: item[:2]).items():
            error = sum(total for _, _, (total, _) in same) / sum(count for _, _, (_, count) in same)
            until = min(start + group[0].digest.width - 1, last)
            rows.append({"label": label, "part": part, "round": start, "until": until, "error": error})
    columns = (
        RUN,
        Column("part", "weight"),
        ROUND,
        Column("until", "to round", 0),
        Column("error", "relative error", 5),
    )
    return Table("layers", "Aggregation error by layer", columns, rows, "As served, mean over rounds and seeds.")
