"""Tables of what runs came to: clients, labels, bytes, time, faults."""

from collections.abc import Iterator, Mapping, Sequence
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
MODEL = {True: "own", False: "global"}
DIRECTIONS = {"up": "up", "down": "down"}


def tabulate_clients(runs: Sequence[Run]) -> Table:
    """Every client's figure in the final round, mean over seeds, and those that ``fedlora personal`` took."""
    rows = []
    for label, own in group_by(runs, lambda run: run.label).items():
        finals = [run.digest.each for run in own]
        rows += list(_each(label, MODEL[own[0].is_personal], finals))
        for key, what in SIDES.items():
            found = [side for run in own if (side := _side(run, key))]
            rows += list(_each(f"{label}: {what}", what, found)) if found else []
    columns = (RUN, Column("model", "model"), CLIENT, Column("value", get_metric(runs), 4), Column("seeds", "seeds", 0))
    note = "Final round, each client's own test rows."
    return Table("clients", f"{get_metric(runs).capitalize()} of each client", columns, rows, note)


def _side(run: Run, key: str) -> list[float | None]:
    column = ((run.personal or {}).get("columns") or {}).get(key) or {}
    return list(column.get("each", []))


def _each(label: str, model: str, finals: Sequence[Sequence[float | None]]) -> Iterator[dict[str, Any]]:
    for client in range(max(map(len, finals), default=0)):
        found = mean_std(final[client] for final in finals if client < len(final))
        if found is not None:
            yield {"label": label, "model": model, "client": str(client), "value": found.mean, "seeds": found.n}


def find_worst(table: Table, higher: bool, many: int = 3) -> dict[str, list[tuple[str, float]]]:
    """Label -> its worst clients with their figures, the worst first."""
    groups = group_by(table.rows, lambda row: row["label"])
    ordered = {k: sorted(own, key=lambda row: row["value"], reverse=not higher) for k, own in groups.items()}
    return {k: [(row["client"], row["value"]) for row in own[:many]] for k, own in ordered.items()}


def tabulate_labels(runs: Sequence[Run]) -> Table:
    """How many training rows of each label every client has, in the first run that says so."""
    run = next((run for run in runs if run.rows and run.rows.get("labels")), None)
    names = [] if run is None else [display_safe(name, 60) for name in (run.rows or {})["labels"]]
    rows = [
        {"client": display_safe(client, 60), "target": name, "rows": int(count)}
        for client, own in ((run.rows or {})["clients"] if run else {}).items()
        for name, count in zip(names, own["labels"])
    ]
    columns = (CLIENT, Column("target", "label"), Column("rows", "training rows", 0))
    whose = f" {run.name} (seed {run.seed})" if run is not None else ""
    alike = "" if run is None or len({r.seed for r in runs}) == 1 else "; other seeds split otherwise"
    return Table("labels", "Labels of each client", columns, rows, f"Training rows, as{whose} split them{alike}.")


def tabulate_bytes(runs: Sequence[Run]) -> Table:
    """Megabytes up and down by part, of a whole run, mean over seeds."""
    rows = []
    for label, own in group_by(runs, lambda run: run.label).items():
        for direction, part in sorted({key for run in own for key in run.digest.bytes}, reverse=True):
            found = mean_std(run.digest.bytes.get((direction, part), 0.0) for run in own)
            assert found is not None, "there are runs"
            rows.append({"label": label, "direction": direction, "part": display_safe(part, 60), "mb": found.mean})
    columns = (RUN, Column("direction", "direction"), Column("part", "part"), Column("mb", "MB", 3))
    return Table(
        "bytes", "Megabytes up and down, by part", columns, rows, "All rounds and clients; tensors that crossed."
    )


def tabulate_phases(runs: Sequence[Run]) -> Table:
    """Seconds of a whole run by phase, mean over seeds."""
    rows = []
    for label, own in group_by(runs, lambda run: run.label).items():
        for phase in (*PHASES, "rest"):
            found = mean_std(run.digest.phases.get(phase) for run in own)
            if found is not None:
                rows.append({"label": label, "phase": phase, "seconds": found.mean})
    columns = (RUN, Column("phase", "phase"), Column("seconds", "seconds", 2))
    return Table("time", "Time by phase", columns, rows, "Seconds of a whole run, mean over seeds.")


def tabulate_faults(runs: Sequence[Run]) -> Table:
    """Quarantined uploads, clients that were away, scores that did not come."""
    rows = [{"label": run.label, "seed": run.seed, **fault} for run in runs for fault in run.digest.faults]
    columns = (RUN, Column("seed", "seed", 0), Column("round", "round", 0), CLIENT, Column("kind", "what"),
               Column("reason", "why"))  # fmt: skip
    return Table("faults", "Quarantined uploads and faults", columns, rows)


def count_faults(runs: Sequence[Run]) -> Mapping[str, int]:
    """Kind of fault -> how many in all runs."""
    found: dict[str, int] = {}
    for run in runs:
        for kind, many in run.digest.counted.items():
            found[kind] = found.get(kind, 0) + many
    return found
