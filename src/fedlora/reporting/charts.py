"""The charts of all figures, each a function of a table's rows, and their one palette.

A chart refers to its data by name, and ``to_vega`` adds the rows. Every row is drawn as one mark.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

COLOURS = (  # each at least 3 : 1 against white and against the dark ground
    "#2f7fc4", "#cf6a10", "#2f9247", "#d64545", "#8a63d2", "#8f6a3d", "#cf4a92", "#14888b", "#767b81", "#83851c",
)  # fmt: skip
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2], [4, 4])  # so that lines differ not by colour only
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
LIGHT, DARK = "#ffffff", "#14171a"  # the backgrounds of page.css
# Vega-Lite's configs: of a single picture; in a page, where text has the page's colour, so light, dark and print need
# no redrawing; on paper, black on white, 8 points.
SCREEN = {
    "background": "white", "title": {"fontSize": 11, "fontWeight": "normal"}, "point": {"size": 22},
    "line": {"strokeWidth": 1.6},
}  # fmt: skip
INK, FAINT = "currentColor", "#80808059"
PAGE = {
    "aria": False,  # the figure has one alternative text and its table
    "background": None, "font": "system-ui, sans-serif",
    "view": {"stroke": FAINT},
    "axis": {"labelColor": INK, "titleColor": INK, "gridColor": FAINT, "domainColor": FAINT, "tickColor": FAINT,
             "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 150},
    "legend": {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12, "orient": "bottom",
               "direction": "horizontal", "titleFontWeight": "normal", "labelLimit": 170, "symbolStrokeWidth": 2},
    "point": {"size": 22}, "line": {"strokeWidth": 1.8},
}  # fmt: skip
SMALL = {"labelFontSize": 7, "titleFontSize": 8, "titleFontWeight": "normal"}
PAPER = {
    "background": "white", "font": "Helvetica, Arial, DejaVu Sans, sans-serif",
    "axis": {**SMALL, "labelLimit": 90, "gridColor": "#dddddd"},
    "legend": {**SMALL, "orient": "bottom", "direction": "horizontal", "columns": 3, "labelLimit": 80,
               "symbolSize": 30},
    "point": {"size": 8}, "line": {"strokeWidth": 1.1},
}  # fmt: skip
MM = 72 / 25.4  # points in a millimetre: one unit of a figure is a point on paper

Rows = Sequence[dict[str, Any]]
DATA = alt.NamedData("rows")  # added by ``to_vega``


def to_vega(chart: alt.TopLevelMixin, rows: Rows, **more: Any) -> dict[str, Any]:
    """Convert a chart to Vega-Lite, with its data and further properties."""
    return {"height": 240, **chart.to_dict(validate=False), "datasets": {DATA.name: list(rows)}, **more}


def distinct(rows: Iterable[Mapping[str, Any]], key: str = "label") -> list[Any]:
    """List the distinct values of a column, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def build_band(
    rows: Rows, x: str, x_title: str, y: str, y_title: str, log: bool = False, by: str = "label",
    every: Sequence[str] = (),
) -> alt.LayerChart:  # fmt: skip
    """Build a line with points for each value of ``by``, and a band of a standard deviation over seeds.

    A name has the same look on all figures with the same ``every``: all names of the report.
    """
    names = distinct(rows, by)
    every = list(dict.fromkeys([*every, *names]))
    places = [every.index(name) for name in names]
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False, nice=False, padding=6)
    ticks = alt.Axis(format="d", values=_list_ticks(rows, x)) if x == "round" else alt.Axis(tickCount=6)
    horizontal = alt.X(f"{x}:Q", title=x_title, scale=scale, axis=ticks)
    vertical = alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=False))
    spread = any(row["high"] > row["low"] for row in rows)
    base = alt.Chart(DATA).encode(x=horizontal, color=_build_scale(alt.Color, by, names, places=places))
    area = base.mark_area(opacity=0.2, tooltip=False).encode(y=alt.Y("low:Q", title=y_title), y2="high:Q")
    lines = [  # one layer each, since a scale of dashes would give the legend's points a dashed rim
        alt.Chart(DATA)
        .transform_filter(alt.FieldEqualPredicate(field=by, equal=name))
        .mark_line(color=COLOURS[place % len(COLOURS)], strokeDash=DASHES[place % len(DASHES)])
        .encode(x=horizontal, y=vertical)
        for name, place in zip(names, places)
    ]
    point = base.mark_point(filled=True, opacity=1).encode(
        y=vertical, shape=_build_scale(alt.Shape, by, names, SHAPES, places), tooltip=_tooltip([by, x, y, "seeds"])
    )  # fmt: skip
    return alt.layer(*([area] if spread else []), *lines, point)


def build_panels(
    rows: Mapping[str, Rows], x: str, x_title: str, y: str, y_title: str, log: bool, every: Sequence[str]
) -> alt.HConcatChart:
    """Build a band with its data for each title that has rows, side by side on the same scales."""
    bands = [
        build_band(panel, x, x_title, y, y_title, log, every=every).properties(
            width=330, height=260, title=title, data=alt.Data(values=list(panel))
        )
        for title, panel in rows.items()
        if panel
    ]
    return alt.hconcat(*bands).resolve_scale(x="shared", y="shared")


def build_strip(rows: Rows, y_title: str) -> alt.Chart:
    """Build a strip of points for each model, one for each client."""
    names = distinct(rows)
    return (
        alt.Chart(DATA, height=26 * len(names))
        .mark_point(filled=True, opacity=0.75, size=40)
        .encode(
            x=alt.X("value:Q", title=y_title, scale=alt.Scale(zero=False)),
            y=alt.Y("label:N", title=None, sort=names),
            color=alt.Color("label:N", sort=names, legend=None, scale=alt.Scale(range=list(COLOURS))),
            tooltip=_tooltip(["label", "client", "value"]),
        )
    )


def build_heat_map(
    rows: Rows, x: str, x_title: str, y: str, y_title: str | None, value: str, title: str, step: int = 18,
    most: float | None = None,
) -> alt.Chart:  # fmt: skip
    """Build a heat map with a cell for each row; ``most`` is the end of the scale of colours."""
    orders = {key: distinct(rows, key) for key in (x, y)}
    return (
        alt.Chart(DATA, height=step * len(orders[y]))
        .mark_rect()
        .encode(
            x=alt.X(f"{x}:O", title=x_title, sort=orders[x], axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(f"{y}:O", title=y_title, sort=orders[y], axis=alt.Axis(labelOverlap=True)),
            color=alt.Color(
                f"{value}:Q", title=title, legend=alt.Legend(gradientLength=140, format=".2~g"),
                scale=alt.Scale(scheme="viridis", domain=[0, most or 1e-12 + max(row[value] for row in rows)]),
            ),
            tooltip=_tooltip([x, y, value]),
        )
    )  # fmt: skip


def build_bars(rows: Rows, x: str, x_title: str, part: str, part_title: str, split: str | None = None) -> alt.Chart:
    """Build a bar of stacked parts for each label, or for each label and value of ``split``."""
    names, parts = distinct(rows), distinct(rows, part)
    chart = (
        alt.Chart(DATA, height=(26 if split is None else 36) * len(names))
        .mark_bar()
        .encode(
            x=alt.X(f"{x}:Q", title=x_title, stack="zero"),
            y=alt.Y("label:N", title=None, sort=names),
            color=_build_scale(alt.Color, part, parts, title=part_title),
            tooltip=_tooltip(["label", *([split] if split else []), part, x]),
        )
    )
    if split is None:
        return chart
    return chart.encode(yOffset=alt.YOffset(f"{split}:N", sort="descending", scale=alt.Scale(paddingInner=0.12)))


def build_counts(rows: Rows) -> alt.Chart:
    """Build bars of the faults by round, with a colour for each kind."""
    return (
        alt.Chart(DATA)
        .mark_bar()
        .encode(
            x=alt.X("round:O", title="round", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("count:Q", title="clients", stack="zero", axis=alt.Axis(tickMinStep=1, format="d")),
            color=_build_scale(alt.Color, "kind", distinct(rows, "kind"), title="what"),
            tooltip=_tooltip(["round", "kind", "count"]),
        )
    )


def _build_scale(
    channel: Any, field: str, names: Sequence[str], looks: Sequence[Any] = COLOURS, places: Sequence[int] = (),
    title: str | None = None,
) -> Any:  # fmt: skip
    """Build a channel that maps each name to the look at its place, or at the name's own if there are no places."""
    scale = alt.Scale(domain=list(names), range=[looks[k % len(looks)] for k in places or range(len(names))])
    legend = alt.Legend(symbolOpacity=1) if len(names) > 1 else None  # a band's own symbols are faint
    return channel(f"{field}:N", sort=list(names), title=title, scale=scale, legend=legend)


def _list_ticks(rows: Rows, x: str, most: int = 8) -> list[int]:
    """List ticks at whole numbers, about ``most`` at most."""
    first, last = (math.floor(pick(row[x] for row in rows)) for pick in (min, max))
    step = next(s for s in (k * 10**e for e in range(12) for k in (1, 2, 5)) if (last - first) / s < most)
    return list(range(-(-first // step) * step, last + 1, step))


def _tooltip(keys: Sequence[str]) -> list[alt.Tooltip]:
    numeric = {"value", "error", "drift", "cosine", "mb", "seconds", "epsilon"}
    return [
        alt.Tooltip(f"{key}:Q", format=".4~g", title=key) if key in numeric else alt.Tooltip(f"{key}:N", title=key)
        for key in keys
    ]
