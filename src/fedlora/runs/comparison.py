"""A comparison as values: its runs, a row of figures for each method, and the table of these rows."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.runs import attendance
from fedlora.runs.table import Column, Table, group_by, mean_std, to_html

if TYPE_CHECKING:
    from pandas import DataFrame

FEWER = " *"  # after a figure that is not over all clients


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    label: str
    seed: int
    table: dict[str, Any]  # the configuration
    folder: str | None
    summary: Mapping[str, Any] | None = None  # None: not run yet, or it diverged
    failure: str | None = None


class Compared(list):
    """The cells of a comparison."""

    def frame(self) -> "DataFrame":
        """A row a run: label, seed, the figures of the final round, and how many clients were ``scored`` for those of
        clients; NaN where a run diverged."""
        import pandas

        found = [
            {"method": cell.label, "seed": cell.seed, "folder": cell.folder}
            | {name: None if cell.summary is None else read(cell.summary) for name, read in COLUMNS.items()}
            | {"scored": (cell.summary or {}).get("scored", {}).get("clients")}
            for cell in self
        ]
        return pandas.DataFrame(found, columns=["method", "seed", *COLUMNS, "scored", "folder"])

    def _repr_html_(self) -> str:
        found = rows(self)
        return to_html(table(found), below=fewer(found))


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row a method: mean and sample standard deviation over its seeds, of final-round figures."""
    found = []
    for label, own in group_by(cells, lambda cell: cell.label).items():
        good = [cell.summary for cell in own if cell.summary is not None]
        row: dict[str, Any] = {"method": label, "seeds": [cell.seed for cell in own], "diverged": len(own) - len(good)}
        row["metric"] = good[0]["metric"] if good else None
        row |= {name: over_seeds(map(read, good)) for name, read in COLUMNS.items()}
        row["by_seed"] = {name: _by_seed(own, COLUMNS[name]) for name in ("global", "clients")}
        row |= attendance.over_seeds([(cell.seed, cell.summary) for cell in own if cell.summary is not None])
        groups = _groups(good)
        found.append({**row, "capability": groups} if groups else row)
    return found


def over_seeds(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and deviation as ``comparison.json`` has them."""
    found = mean_std(values)
    return None if found is None else {"mean": found.mean, "std": found.std}


def _by_seed(cells: Sequence[Cell], read: Callable[[Mapping[str, Any]], float | None]) -> dict[str, float]:
    """A figure of each seed, for paired tests; the keys are texts, as JSON has them."""
    found = {str(cell.seed): read(cell.summary) for cell in cells if cell.summary is not None}
    return {seed: value for seed, value in found.items() if value is not None}


def _groups(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The clients' own figures by capability, the weakest first, over seeds."""
    groups = [g for s in summaries for g in s.get("final", {}).get("clients", {}).get("capability", [])]
    return [
        {"capability": level, "clients": statistics.fmean(group["clients"] for group in same)}
        | {key: over_seeds(group[key] for group in same) for key in ("mean", "worst")}
        for level, same in sorted(group_by(groups, lambda group: group["capability"]).items())
    ]


def table(rows: Sequence[Mapping[str, Any]], is_detailed: bool = False) -> Table:
    """A row a method: mean ± sample standard deviation over its seeds. Runs that diverged count in no figure.

    ``is_detailed`` adds a digit, the number of seeds, and the deviation of bytes and seconds.
    """
    metric = next((row["metric"]["name"] for row in rows if row["metric"]), "accuracy").replace("_", " ")
    columns = [Column("label", "method")]
    columns += [Column("seeds", "seeds", 0)] if is_detailed else []
    columns += [Column("diverged", "diverged", 0)] if any(row["diverged"] for row in rows) else []
    columns += figure_columns(metric, is_detailed)
    spread = ", mean ± standard deviation over seeds" if max((len(row["seeds"]) for row in rows), default=0) > 1 else ""
    title = f"{metric.capitalize()} in the final round{spread}"
    return Table("methods", title, tuple(columns), [_flat(row, columns) for row in rows])


def figure_columns(metric: str, is_detailed: bool) -> list[Column]:
    """The columns of the final figures."""
    digits, of = (4, f" {metric}") if is_detailed else (3, "")
    return [
        Column("global", f"global{of}", digits, "global_std"),
        Column("clients", f"clients' own{of}", digits, "clients_std", "few"),
        Column("worst", "worst client", digits, "worst_std", "few"),
        Column("mb_up", "MB up", 2, "mb_up_std" if is_detailed else None),
        Column("mb_down", "MB down", 2, "mb_down_std" if is_detailed else None),
        Column("error", "aggregation error", 4, "error_std"),
        Column("seconds", "seconds", *((1, "seconds_std") if is_detailed else (0, None))),
    ]


def _flat(row: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    found: dict[str, Any] = {"label": row["method"], "seeds": len(row["seeds"]) - row["diverged"]}
    found |= {"diverged": row["diverged"], "few": FEWER if row.get("over") else ""}
    for column in columns:
        if isinstance(own := row.get(column.key), Mapping):
            found |= {column.key: own["mean"], f"{column.key}_std": own["std"]}
    return found


def fewer(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each method whose figures are not over all clients, and for each client that was missing."""
    lines = []
    for row in rows:
        lines += [f"{row['method']}{FEWER}: clients' own over {', '.join(row['over'])}"] if row.get("over") else []
        lines += [f"{row['method']}: {who}" for who in row.get("missing", ())]
    return lines


def _final(*keys: str) -> Callable[[Mapping[str, Any]], float | None]:
    def read(summary: Mapping[str, Any]) -> float | None:
        value: Any = summary.get("final", {})
        for key in keys:
            value = value.get(key, {}) if isinstance(value, Mapping) else {}
        return None if value == {} else float(value)

    return read


COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "global": lambda s: _final("global", s["metric"]["name"])(s),
    "clients": _final("clients", "mean"),
    "examples": _final("clients", "examples_mean"),
    "worst": _final("clients", "worst"),
    "mb_up": lambda s: sum(s["bytes"]["up"].values()) / 1e6,
    "mb_down": lambda s: sum(s["bytes"]["down"].values()) / 1e6,
    "error": lambda s: s["errors"].get("served"),
    "error_fedit": lambda s: s["errors"].get("fedit"),
    "error_best": lambda s: s["errors"].get("best"),
    "drift": lambda s: s["errors"].get("drift"),
    "seconds": lambda s: s["seconds"]["whole"],
}
