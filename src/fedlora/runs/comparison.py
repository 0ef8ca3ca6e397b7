"""A comparison of runs: its cells, one a run, and the figures of their final rounds over seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.runs import attendance
from fedlora.runs.result import table
from fedlora.schema import Table

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    label: str
    seed: int
    table: Table
    folder: str | None
    summary: Mapping[str, Any] | None = None  # None: not run yet, or it diverged
    failure: str | None = None


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


class Compared(list):
    """The cells of a comparison."""

    def frame(self) -> "DataFrame":
        """A row a run: label, seed, the figures of the final round, and how many clients were ``scored`` for those of
        clients; NaN where a run diverged."""
        import pandas

        rows = [
            {"method": cell.label, "seed": cell.seed, "folder": cell.folder}
            | {name: None if cell.summary is None else read(cell.summary) for name, read in COLUMNS.items()}
            | {"scored": (cell.summary or {}).get("scored", {}).get("clients")}
            for cell in self
        ]
        return pandas.DataFrame(rows, columns=["method", "seed", *COLUMNS, "scored", "folder"])

    def _repr_html_(self) -> str:
        names = ("global", "clients", "worst", "mb_up", "mb_down", "error", "seconds")
        compared = rows(self)
        found = [[row["method"], *(_spread(row[name]) for name in names)] for row in compared]
        about = [f"{row['method']}: clients' own over {', '.join(row['over'])}" for row in compared if "over" in row]
        about += [f"{row['method']}: {who}" for row in compared for who in row.get("missing", ())]
        return table("Final round, mean ± standard deviation over seeds", ["method", *names], found, about)


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row a method: mean and sample standard deviation over its seeds, of final-round figures."""
    found = []
    for label in dict.fromkeys(cell.label for cell in cells):
        own = [cell for cell in cells if cell.label == label]
        good = [cell.summary for cell in own if cell.summary is not None]
        row: dict[str, Any] = {"method": label, "seeds": [cell.seed for cell in own], "diverged": len(own) - len(good)}
        row["metric"] = good[0]["metric"] if good else None
        for name, read in COLUMNS.items():
            values = [value for value in map(read, good) if value is not None]
            row[name] = mean_and_std(values)
        row["by_seed"] = {name: _by_seed(own, COLUMNS[name]) for name in ("global", "clients")}
        row |= attendance.over_seeds([(cell.seed, cell.summary) for cell in own if cell.summary is not None])
        groups = _groups(good)
        found.append({**row, "capability": groups} if groups else row)
    return found


def _by_seed(cells: Sequence[Cell], read: Callable[[Mapping[str, Any]], float | None]) -> dict[str, float]:
    """A figure of each seed, for paired tests; the keys are texts, as JSON has them."""
    found = {str(cell.seed): read(cell.summary) for cell in cells if cell.summary is not None}
    return {seed: value for seed, value in found.items() if value is not None}


def mean_and_std(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and sample standard deviation, 0 of one value; None of no values."""
    if not values:
        return None
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _groups(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The clients' own figures by capability, the weakest first, over seeds."""
    seen: dict[float, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        for group in summary.get("final", {}).get("clients", {}).get("capability", []):
            seen.setdefault(group["capability"], []).append(group)
    return [
        {"capability": level, "clients": statistics.fmean(group["clients"] for group in same)}
        | {key: mean_and_std([group[key] for group in same]) for key in ("mean", "worst")}
        for level, same in sorted(seen.items())
    ]


def _spread(value: Mapping[str, float] | None) -> str | None:
    if value is None:
        return None
    return f"{value['mean']:.4g}" + (f" ± {value['std']:.2g}" if value["std"] else "")
