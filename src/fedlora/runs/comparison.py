"""The runs of a comparison, a row of figures for each method, and the table of these rows."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.runs.attendance import describe_scored_clients, fault_lines
from fedlora.runs.table import Column, Table, group_by, mean_std, to_html

if TYPE_CHECKING:
    from pandas import DataFrame

MARK = " *"  # after a figure that is not over all clients


@dataclass(frozen=True)
class Cell:
    """A run of a comparison."""

    label: str
    seed: int
    table: dict[str, Any]  # the configuration
    folder: str | None
    summary: Mapping[str, Any] | None = None  # None: not yet run, or diverged
    failure: str | None = None


class Compared(list[Cell]):
    """The runs of a comparison, in the order of methods and seeds."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each method: mean and standard deviation of each figure over its seeds, as in comparison.json."""
        return comparison_rows(self)

    def frame(self) -> "DataFrame":
        """Return a data frame with a row for each run: the figures of the final round, and the number of clients that
        were ``scored``. A run that diverged has NaN."""
        import pandas

        rows = [
            {"method": cell.label, "seed": cell.seed, "folder": cell.folder}
            | {name: None if cell.summary is None else read(cell.summary) for name, read in COLUMNS.items()}
            | {"scored": (cell.summary or {}).get("scored", {}).get("clients")}
            for cell in self
        ]
        return pandas.DataFrame(rows, columns=["method", "seed", *COLUMNS, "scored", "folder"])

    def _repr_html_(self) -> str:
        rows = self.rows
        return to_html(comparison_table(rows), below=coverage_notes(rows))


def comparison_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a row for each method: mean and sample standard deviation over its seeds, of final-round figures."""
    return [_row(label, group) for label, group in group_by(cells, lambda cell: cell.label).items()]


def _row(label: str, cells: Sequence[Cell]) -> dict[str, Any]:
    summaries = {cell.seed: cell.summary for cell in cells if cell.summary is not None}
    good = list(summaries.values())
    row: dict[str, Any] = {"method": label, "seeds": [cell.seed for cell in cells], "diverged": len(cells) - len(good)}
    row["metric"] = good[0]["metric"] if good else None
    row |= {name: mean_std_table(map(read, good)) for name, read in COLUMNS.items()}
    row["by_seed"] = {  # for paired tests
        name: {str(seed): value for seed, s in summaries.items() if (value := COLUMNS[name](s)) is not None}
        for name in ("global", "clients")
    }
    over = [f"seed {seed}: {who}" for seed, s in summaries.items() if (who := describe_scored_clients(s)) != "clients"]
    missing = [f"seed {seed}, {who} {when}" for seed, s in summaries.items() for who, when in fault_lines(s)]
    groups = [g for s in good for g in s.get("final", {}).get("clients", {}).get("capability", [])]
    capability = [  # the weakest first
        {"capability": level, "clients": statistics.fmean(group["clients"] for group in same)}
        | {key: mean_std_table(group[key] for group in same) for key in ("mean", "worst")}
        for level, same in sorted(group_by(groups, lambda group: group["capability"]).items())
    ]
    notes = {"over": over, "missing": missing, "capability": capability}
    return row | {key: value for key, value in notes.items() if value}


def mean_std_table(values: Iterable[float | None]) -> dict[str, float] | None:
    """Return mean and deviation, as ``comparison.json`` has them."""
    figure = mean_std(values)
    return None if figure is None else {"mean": figure.mean, "std": figure.std}


def comparison_table(rows: Sequence[Mapping[str, Any]], is_detailed: bool = False) -> Table:
    """Return the table of the rows: mean ± sample standard deviation over seeds, without runs that diverged.

    ``is_detailed`` adds a digit, the number of seeds, and the deviation of bytes and seconds.
    """
    metric = next((row["metric"]["name"] for row in rows if row["metric"]), "accuracy").replace("_", " ")
    columns = [Column("label", "method")]
    columns += [Column("seeds", "seeds", 0)] if is_detailed else []
    columns += [Column("diverged", "diverged", 0)] if any(row["diverged"] for row in rows) else []
    columns += figure_columns(metric, is_detailed)
    spread = ", mean ± standard deviation over seeds" if max((len(row["seeds"]) for row in rows), default=0) > 1 else ""
    title = f"{metric.capitalize()} in the final round{spread}"
    table_rows = []
    for row in rows:
        cells: dict[str, Any] = {"label": row["method"], "seeds": len(row["seeds"]) - row["diverged"]}
        cells |= {"diverged": row["diverged"], "few": MARK if row.get("over") else ""}
        for column in columns:
            if isinstance(figure := row.get(column.key), Mapping):
                cells |= {column.key: figure["mean"], f"{column.key}_std": figure["std"]}
        table_rows.append(cells)
    return Table("methods", title, tuple(columns), table_rows)


def figure_columns(metric: str, is_detailed: bool) -> list[Column]:
    """Return the columns of the final figures."""
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


def coverage_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note for each method whose figures are not over all clients, and for each fault of a client."""
    notes = []
    for row in rows:
        notes += [f"{row['method']}{MARK}: clients' own over {', '.join(row['over'])}"] if row.get("over") else []
        notes += [f"{row['method']}: {fault}" for fault in row.get("missing", ())]
    return notes


def _final(summary: Mapping[str, Any], model: str, figure: str) -> float | None:
    value = summary.get("final", {}).get(model, {}).get(figure)
    return None if value is None else float(value)


COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "global": lambda s: _final(s, "global", s["metric"]["name"]),
    "clients": lambda s: _final(s, "clients", "mean"),
    "examples": lambda s: _final(s, "clients", "examples_mean"),
    "worst": lambda s: _final(s, "clients", "worst"),
    "mb_up": lambda s: sum(s["bytes"]["up"].values()) / 1e6,
    "mb_down": lambda s: sum(s["bytes"]["down"].values()) / 1e6,
    "error": lambda s: s["errors"].get("served"),
    "error_fedit": lambda s: s["errors"].get("fedit"),
    "error_best": lambda s: s["errors"].get("best"),
    "drift": lambda s: s["errors"].get("drift"),
    "seconds": lambda s: s["seconds"]["whole"],
}
