"""The table of a sweep."""

from collections.abc import Mapping
from typing import Any

from fedlora.reporting.tables.comparison import rank
from fedlora.runs.table import DASH, Column, Table


def tabulate_sweep(result: Mapping[str, Any]) -> list[Table | str]:
    """Build the table of the trials, and a sentence on the choice for each method."""
    metric = result["metric"]["name"].replace("_", " ") if result["metric"] else "figure"
    seeds = f", mean over {len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else ""
    title = f"{metric.capitalize()} on validation rows ({result['validation']}) in the final round{seeds}"
    rows = [
        {"method": row["method"], "trial": str(trial["trial"]), "values": _format_values(trial["values"]),
         "value": trial["value"], "remark": _describe_trial(row, trial)}
        for row in result["methods"]
        for trial in row["trials"]
    ]  # fmt: skip
    columns = (Column("method", "method"), Column("trial", "trial"), Column("values", "values"),
               Column("value", metric, 4), Column("remark", "remark"))  # fmt: skip
    return [Table("sweep", title, columns, rows), *(_describe_choice(row, metric, result) for row in result["methods"])]


def format_next_command(result: Mapping[str, Any], folder: str) -> tuple[str, ...]:
    """Return the command that compares the chosen settings; empty if no trial was chosen."""
    chosen = ",".join(row["method"] for row in result["methods"] if row["chosen"] is not None)
    return (f"Next: fedlora compare {folder}/chosen.toml --methods {chosen} --seeds 0,1,2",) if chosen else ()


def _describe_trial(row: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    if trial["diverged"]:
        return "diverged"
    remarks = ["chosen"] if trial["trial"] == row["chosen"] else []
    return ", ".join([*remarks, *([f"mean over {trial['over']}"] if trial.get("over") else [])])


def _describe_choice(row: Mapping[str, Any], metric: str, result: Mapping[str, Any]) -> str:
    """Name the chosen trial, and compare it with the others by the paired test over seeds."""
    trials = row["trials"]
    if row["chosen"] is None:
        return f"{row['method']}: none of {len(trials)} trials came to a figure; try smaller learning rates."
    values = {f"trial {t['trial']}": dict(zip(result["seeds"], t["each"])) for t in trials if t["value"] is not None}
    best = rank(values, result["metric"]["higher"])
    how = f"best of {len(trials)}" if best is not None and not best.level else f"chosen of {len(trials)} by the mean"
    verdict = "" if best is None else f"; {best.verdict}"
    choice = f"{row['method']}: {_format_values(row['values'])} ({metric} {row['value']:.4f}, {how}{verdict})"
    if row["edge"]:
        return f"{choice}; {' and '.join(row['edge'])} lies at the edge of what was tried: extend the grid."
    return f"{choice}."


def _format_values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items()) or DASH
