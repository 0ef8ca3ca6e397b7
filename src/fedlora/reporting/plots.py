"""Figures of a comparison: its metric by round, and by megabyte."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from fedlora.runs.attendance import Attendance
from fedlora.runs.comparison import Cell
from fedlora.runs.folder import RunFolder

PANELS = {"clients' own models, own test rows": "clients", "shared model, global test rows": "global"}
FORMATS = ("png", "svg")
NAMED = 8  # runs that are named above a figure
MEGABYTES = "megabytes sent and received, all clients (log scale)"


def draw(cells: Sequence[Cell], out: Path) -> list[Path]:
    """``METRIC-by-round`` and ``METRIC-by-megabyte`` as PNG and SVG in ``out``; returns the PNGs."""
    metric = next((cell.summary["metric"]["name"] for cell in cells if cell.summary is not None), "accuracy")
    points = [point for cell in cells if cell.summary is not None for point in _points(cell, metric)]
    if not points:
        return []
    few = _fewer(cells)
    charts = {
        f"{metric}-by-round": _chart(points, alt.X("round:Q", title="round"), metric, few),
        f"{metric}-by-megabyte": _chart(
            points, alt.X("mb:Q", title=MEGABYTES, scale=alt.Scale(type="log")), metric, few
        ),
    }  # fmt: skip
    for name, chart in charts.items():
        for kind in FORMATS:
            chart.save(str(out / f"{name}.{kind}"), **({"scale_factor": 2.0} if kind == "png" else {}))
    return [out / f"{name}.png" for name in charts]


def _fewer(cells: Sequence[Cell]) -> list[str]:
    """A line a run whose means over clients are not over all clients, at most ``NAMED`` of them."""
    said = []
    for cell in cells:
        if cell.summary is not None:
            kept = Attendance(cell.summary["clients"])
            for record in RunFolder(Path(str(cell.folder))).records:
                kept.take(record)
            said += [f"{cell.label}, seed {cell.seed}: {kept.means}"] if kept.means else []
    return said[:NAMED] + ([f"and {len(said) - NAMED} more runs"] if len(said) > NAMED else [])


def _points(cell: Cell, metric: str) -> list[dict[str, Any]]:
    found, rows = [], RunFolder(Path(str(cell.folder))).records
    sizes = itertools.accumulate(sum(sum(row["bytes"][d].values()) for d in ("up", "down")) / 1e6 for row in rows)
    for row, mb in zip(rows, sizes):
        for panel, key in PANELS.items():
            value = row.get(key, {}).get("mean" if key == "clients" else metric)
            if value is not None:
                found.append(
                    {
                        "method": cell.label,
                        "seed": cell.seed,
                        "round": row["round"],
                        "mb": mb,
                        "panel": panel,
                        "value": value,
                    }
                )
    return found


def _chart(points: list[dict[str, Any]], x: alt.X, metric: str, few: Sequence[str] = ()) -> alt.FacetChart:
    """One panel a kind of model; a line a method, the mean over seeds. ``few`` stands above it."""
    mean: dict[tuple, list[dict[str, Any]]] = {}
    for point in points:
        mean.setdefault((point["method"], point["panel"], point["round"]), []).append(point)
    data = [
        {**same[0], **{key: sum(p[key] for p in same) / len(same) for key in ("value", "mb")}}
        for same in mean.values()
        if all(p["mb"] > 0 or x.shorthand != "mb:Q" for p in same)  # nothing sent has no place on a log scale
    ]
    methods = list(dict.fromkeys(point["method"] for point in points))
    line = alt.Chart(alt.Data(values=data)).mark_line(point=alt.OverlayMarkDef(size=14), strokeWidth=1.6)
    chart = (
        line.encode(
            x=x,
            y=alt.Y("value:Q", title=metric.replace("_", " "), scale=alt.Scale(zero=False)),
            color=alt.Color("method:N", sort=methods, title="method", scale=alt.Scale(scheme="tableau10")),
            strokeDash=alt.StrokeDash("method:N", sort=methods, legend=None),
        )
        .properties(width=330, height=260)
        .facet(column=alt.Column("panel:N", title=None, sort=list(PANELS)))
        .resolve_scale(x="shared", y="shared")
    )
    above = alt.TitleParams(text=list(few), anchor="start", fontSize=10, fontWeight=400)
    return chart.properties(title=above) if few else chart
