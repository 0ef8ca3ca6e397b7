"""The table of a sweep: its trials, and the choice for each method."""

from collections.abc import Mapping
from typing import Any

from fedlora.reporting.tables.comparison import rank
from fedlora.runs.table import DASH, Column, Table


def tabulate_sweep(found: Mapping[str, Any]) -> list[Table | str]:
    """A row a trial, and a sentence on the choice for each method."""
    metric = found["metric"]["name"].replace("_", " ") if found["metric"] else "figure"
    seeds = f", mean over {len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else ""
    title = f"{metric.capitalize()} on validation rows ({found['validation']}) in the final round{seeds}"
    rows = [
        {"method": row["method"], "trial": str(trial["trial"]), "values": _values(trial["values"]),
         "value": trial["value"], "remark": _remark(row, trial)}
        for row in found["methods"]
        for trial in row["trials"]
    ]  # fmt: skip
    columns = (Column("method", "method"), Column("trial", "trial"), Column("values", "values"),
               Column("value", metric, 4), Column("remark", "remark"))  # fmt: skip
    return [Table("sweep", title, columns, rows), *(_sentence(row, metric, found) for row in found["methods"])]


def format_next_command(found: Mapping[str, Any], folder: str) -> tuple[str, ...]:
    """The command that compares the chosen settings; nothing where no trial was chosen."""
    chosen = ",".join(row["method"] for row in found["methods"] if row["chosen"] is not None)
    return (f"Next: fedlora compare {folder}/chosen.toml --methods {chosen} --seeds 0,1,2",) if chosen else ()


def _remark(row: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    if trial["diverged"]:
        return "diverged"
    over = [f"mean over {trial['over']}"] if trial.get("over") else []
    return ", ".join((["chosen"] if trial["trial"] == row["chosen"] else []) + over)


def _sentence(row: Mapping[str, Any], metric: str, found: Mapping[str, Any]) -> str:
    trials = len(row["trials"])
    if row["chosen"] is None:
        return f"{row['method']}: none of {trials} trials came to a figure; try smaller learning rates."
    said = f"{row['method']}: {_values(row['values'])} ({metric} {row['value']:.4f}, {_standing(row, found)})"
    if row["edge"]:
        return f"{said}; {' and '.join(row['edge'])} lies at the edge of what was tried: extend the grid."
    return f"{said}."


def _standing(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How sure the choice is: the chosen trial beside the others, by the paired test over seeds."""
    values = {t["trial"]: dict(zip(found["seeds"], t["each"])) for t in row["trials"] if t["value"] is not None}
    one = rank({f"trial {k}": own for k, own in values.items()}, found["metric"]["higher"])
    trials = f"chosen of {len(row['trials'])} by the mean"
    return (
        trials
        if one is None
        else f"{trials}; {one.verdict}"
        if one.level
        else f"best of {len(row['trials'])}; {one.verdict}"
    )


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items()) or DASH
