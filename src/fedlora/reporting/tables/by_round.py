"""Tables over rounds: scores, errors, drift, cosine similarity and epsilon. Each row is a mean over seeds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The runs' metric in words."""
    return runs[0].metric.replace("_", " ")


def average_by_round(runs: Sequence[Run], read: Read, value: str) -> Iterator[dict[str, Any]]:
    """A row a label and round: the figure's mean, ``low`` and ``high`` (a standard deviation away), ``seeds``.

    ``mb`` and ``seconds`` are how much was sent and how long it took until then, mean over the same seeds.
    """
    for label, own in group_by(runs, lambda run: run.label).items():
        rounds = group_by((row for run in own for row in run.digest.rounds), lambda row: int(row["round"]))
        for round, rows in sorted(rounds.items()):
            rows = [row for row in rows if read(row) is not None]
            found = mean_std(map(read, rows))
            if found is not None:
                ends = {"low": found.mean - found.std, "high": found.mean + found.std, "seeds": found.n}
                until = {key: sum(row[key] for row in rows) / len(rows) for key in ("mb", "seconds")}
                yield {"label": label, "round": round, value: found.mean, **ends, **until, **_scored(rows)}


def _scored(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many clients were scored in a round, the fewest over its seeds."""
    return {} if any(row["scored"] is None for row in rows) else {"scored": min(row["scored"] for row in rows)}


def tabulate_curves(runs: Sequence[Run]) -> Table:
    """The metric by round, megabyte and second."""
    rows = [
        {**row, "model": model}
        for model in MODELS
        for row in average_by_round(runs, lambda row, m=model: row[m], "value")  # type: ignore[misc]
    ]
    columns = (RUN, Column("model", "model"), ROUND, Column("mb", "MB sent and received", 3),
               Column("seconds", "seconds", 1), Column("value", get_metric(runs), 4),
               Column("low", "less a standard deviation", 4), Column("high", "more a standard deviation", 4),
               SEEDS, *([Column("scored", "clients scored", 0)] if describe_missing(runs) else []))  # fmt: skip
    note = "global: the shared model on the global test rows; clients: each on its own test rows, mean over clients."
    return Table("curves", f"{get_metric(runs).capitalize()} by round", columns, rows, note + describe_missing(runs))


def describe_missing(runs: Sequence[Run], most: int = 6) -> str:
    """Of the runs whose means over clients are not over all clients, in which rounds; empty where there are none."""
    said = [f"{run.name}: {text}" for run in runs if (text := run.digest.means)]
    more = [f"{len(said) - most} more runs"] if len(said) > most else []
    return f" Not over all clients: {'; '.join([*said[:most], *more])}." if said else ""


def tabulate_errors(runs: Sequence[Run]) -> Table:
    """Aggregation errors by round: as served, and what FedIT and the best of the rank made of the same uploads."""
    rows = [
        {**row, "measure": MEASURES[name]}
        for name in ERRORS
        for row in average_by_round(runs, lambda row, n=name: row[n], "error")  # type: ignore[misc]
    ]
    columns = (RUN, Column("measure", "what"), ROUND, Column("error", "relative error", 5), SEEDS)
    note = "‖served − exact mean‖ / ‖exact mean‖, mean over the adapted weights and over seeds."
    return Table("errors", "Aggregation error by round", columns, rows, note)


def tabulate_oracle_by_round(runs: Sequence[Run]) -> Table:
    """What every method would have served of the same uploads (``fedlora compare --oracle``)."""
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
    """How far the clients' weights lie from their mean."""
    rows = list(average_by_round(runs, lambda row: row["drift"], "drift"))
    columns = (RUN, ROUND, Column("drift", "client drift", 4), SEEDS)
    note = "√(Σ w ‖client − mean‖²) / ‖mean‖ of the clients' updates, mean over the adapted weights."
    return Table("drift", "Client drift by round", columns, rows, note)


def tabulate_cosines(runs: Sequence[Run]) -> Table:
    """How alike the clients' A and B are."""
    rows = [
        {**row, "factor": leaf}
        for leaf in "AB"
        for row in average_by_round(runs, lambda row, n=f"cosine {leaf}": row[n], "cosine")  # type: ignore[misc]
    ]
    columns = (RUN, Column("factor", "factor"), ROUND, Column("cosine", "cosine", 4), SEEDS)
    note = "Cosine of two clients' factors at the end of their turns, mean over pairs of clients and adapted weights."
    return Table("cosine", "Cosine similarity of the clients' A and B", columns, rows, note)


def tabulate_epsilon(runs: Sequence[Run]) -> Table:
    """What has been spent of the privacy budget."""
    rows = list(average_by_round(runs, lambda row: row["epsilon"], "epsilon"))
    columns = (RUN, ROUND, Column("epsilon", "ε", 3), SEEDS)
    deltas = sorted({row["delta"] for run in runs for row in run.digest.rounds if row["delta"] is not None})
    at = f" at δ = {' and '.join(f'{x:.2g}' for x in deltas)}" if deltas else ""
    return Table("epsilon", "Privacy spent by round", columns, rows, f"ε of the worst client{at}, after each round.")


def tabulate_layers(runs: Sequence[Run]) -> Table:
    """The served error of each adapted weight, over stretches of rounds."""
    rows = []
    for label, own in group_by(runs, lambda run: run.label).items():
        sums: dict[tuple[str, int], list[tuple[float, int]]] = {}
        for run in own:
            for part, bins in run.digest.layers.items():
                for place, pair in bins.items():
                    sums.setdefault((part, place), []).append(pair)
        last = max((row["round"] for run in own for row in run.digest.rounds), default=0)
        for (part, place), pairs in sums.items():
            error = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
            until = min(place + own[0].digest.width - 1, last)
            rows.append({"label": label, "part": part, "round": place, "until": until, "error": error})
    columns = (
        RUN,
        Column("part", "weight"),
        ROUND,
        Column("until", "to round", 0),
        Column("error", "relative error", 5),
    )
    return Table("layers", "Aggregation error by layer", columns, rows, "As served, mean over rounds and seeds.")
