"""Tables of totals: clients, labels, bytes, time, faults."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any

from fedlora.reporting.digest import PHASES
from fedlora.reporting.load import Run
from fedlora.reporting.tables.by_round import RUN, get_metric
from fedlora.runs.table import Column, Table, group_by, mean_std
from fedlora.text import display_safe

CLIENT = Column("client", "client")
SIDES = {  # of `fedlora personal`
    "global": "global", "held": "own", "tuned": "fine-tuned", "local": "local-only", "centralised": "centralised",
}  # fmt: skip


def tabulate_clients(runs: Sequence[Run]) -> Table:
    """Build the table of every client's final figure, mean over seeds, with those of ``fedlora personal``."""
    rows: list[dict[str, Any]] = []
    for label, group in group_by(runs, lambda run: run.label).items():
        model = "own" if (group[0].summary or {}).get("personal") else "global"
        rows += _average_clients(label, model, [run.digest.each for run in group])
        for key, model in SIDES.items():
            sides = [((run.personal or {}).get("columns") or {}).get(key) or {} for run in group]
            rows += _average_clients(f"{label}: {model}", model, [side.get("each", []) for side in sides])
    columns = (RUN, Column("model", "model"), CLIENT, Column("value", get_metric(runs), 4), Column("seeds", "seeds", 0))
    note = "Final round, each client's own test rows."
    return Table("clients", f"{get_metric(runs).capitalize()} of each client", columns, rows, note)


def _average_clients(label: str, model: str, finals: Sequence[Sequence[float | None]]) -> Iterator[dict[str, Any]]:
    for client in range(max(map(len, finals), default=0)):
        mean = mean_std(final[client] for final in finals if client < len(final))
        if mean is not None:
            yield {"label": label, "model": model, "client": str(client), "value": mean.mean, "seeds": mean.n}


def find_worst(table: Table, higher: bool, many: int = 3) -> dict[str, list[tuple[str, float]]]:
    """Return label -> its worst clients with their figures, the worst first."""
    groups = group_by(table.rows, lambda row: row["label"])
    ordered = {label: sorted(rows, key=itemgetter("value"), reverse=not higher) for label, rows in groups.items()}
    return {label: [(row["client"], row["value"]) for row in rows[:many]] for label, rows in ordered.items()}


def tabulate_labels(runs: Sequence[Run]) -> Table:
    """Build the table of every client's training rows of each label, in the first run that records them."""
    run = next((run for run in runs if run.rows and run.rows.get("labels")), None)
    data: Mapping[str, Any] = {"labels": [], "clients": {}} if run is None or run.rows is None else run.rows
    names = [display_safe(name, 60) for name in data["labels"]]
    rows = [
        {"client": display_safe(client, 60), "target": name, "rows": int(count)}
        for client, counts in data["clients"].items()
        for name, count in zip(names, counts["labels"])
    ]
    columns = (CLIENT, Column("target", "label"), Column("rows", "training rows", 0))
    source = f" {run.name} (seed {run.seed})" if run is not None else ""
    others = "" if run is None or len({r.seed for r in runs}) == 1 else "; other seeds split otherwise"
    return Table("labels", "Labels of each client", columns, rows, f"Training rows, as{source} split them{others}.")


def tabulate_bytes(runs: Sequence[Run]) -> Table:
    """Build the table of a whole run's megabytes up and down by part, mean over seeds."""
    rows = []
    for label, group in group_by(runs, lambda run: run.label).items():
        for direction, part in sorted({key for run in group for key in run.digest.bytes}, reverse=True):
            mean = fmean(run.digest.bytes.get((direction, part), 0.0) for run in group)
            rows.append({"label": label, "direction": direction, "part": display_safe(part, 60), "mb": mean})
    columns = (RUN, Column("direction", "direction"), Column("part", "part"), Column("mb", "MB", 3))
    note = "All rounds and clients; tensors that crossed."
    return Table("bytes", "Megabytes up and down, by part", columns, rows, note)


def tabulate_phases(runs: Sequence[Run]) -> Table:
    """Build the table of a whole run's seconds by phase, mean over seeds."""
    rows = []
    for label, group in group_by(runs, lambda run: run.label).items():
        for phase in (*PHASES, "rest"):
            mean = mean_std(run.digest.phases.get(phase) for run in group)
            if mean is not None:
                rows.append({"label": label, "phase": phase, "seconds": mean.mean})
    columns = (RUN, Column("phase", "phase"), Column("seconds", "seconds", 2))
    return Table("time", "Time by phase", columns, rows, "Seconds of a whole run, mean over seeds.")


def tabulate_faults(runs: Sequence[Run]) -> Table:
    """Build the table of quarantined uploads, absent clients and missing scores."""
    rows = [{"label": run.label, "seed": run.seed, **fault} for run in runs for fault in run.digest.faults]
    columns = (RUN, Column("seed", "seed", 0), Column("round", "round", 0), CLIENT, Column("kind", "what"),
               Column("reason", "why"))  # fmt: skip
    return Table("faults", "Quarantined uploads and faults", columns, rows)


def count_faults(runs: Sequence[Run]) -> dict[str, int]:
    """Count the faults of all runs by kind."""
    return dict(sum((Counter(run.digest.counted) for run in runs), Counter[str]()))
