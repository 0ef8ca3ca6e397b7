"""What a sweep came to."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedlora.reporting.tables.paired import ranking
from fedlora.reporting.terminal import DASH, stdout


def sweep(found: Mapping[str, Any], folder: str) -> None:
    """A row a trial, and what was chosen for each method."""
    metric = found["metric"]["name"].replace("_", " ") if found["metric"] else "figure"
    seeds = f", mean over {len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else ""
    table = Table(title=f"{metric.capitalize()} on validation rows ({found['validation']}) in the final round{seeds}")
    for name in ("method", "trial", "values"):
        table.add_column(name, overflow="fold")
    table.add_column(metric, justify="right")
    table.add_column("")
    for row in found["methods"]:
        for trial in row["trials"]:
            value = DASH if trial["value"] is None else f"{trial['value']:.4f}"
            table.add_row(row["method"], str(trial["trial"]), _values(trial["values"]), value, _remark(row, trial))
    console = stdout()
    console.print(table)
    for row in found["methods"]:
        console.print(_sentence(row, metric, found), markup=False)
    chosen = ",".join(row["method"] for row in found["methods"] if row["chosen"] is not None)
    if chosen:
        console.print(f"Next: fedlora compare {folder}/chosen.toml --methods {chosen} --seeds 0,1,2", soft_wrap=True)


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
    one = ranking({f"trial {k}": own for k, own in values.items()}, found["metric"]["higher"])
    trials = f"chosen of {len(row['trials'])} by the mean"
    return (
        trials if one is None else f"{trials}; {one.said}" if one.level else f"best of {len(row['trials'])}; {one.said}"
    )


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items()) or DASH
