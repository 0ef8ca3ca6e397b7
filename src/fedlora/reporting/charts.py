"""The charts of all figures, each a function of a table's rows, and their one palette.

A chart refers to its data by name, and ``with_rows`` adds the rows. Every row is drawn as one mark. The colours hold on
white and on black; ``page_config`` has the sizes of a page, ``paper_config`` those of a paper's column.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

COLOURS = (  # each at least 3 : 1 against white and against the dark ground
    "#2f7fc4", "#cf6a10", "#2f9247", "#d64545", "#8a63d2", "#8f6a3d", "#cf4a92", "#14888b", "#767b81", "#83851c",
)  # fmt: skip
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2], [4, 4])  # lines differ by more than colour
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
LIGHT, DARK = "#ffffff", "#14171a"  # the page's grounds, see page.css
HEAT = "viridis"
MM = 72 / 25.4  # points in a millimetre: one unit of a figure is a point on paper

Rows = Sequence[dict[str, Any]]
DATA = alt.NamedData("rows")  # whoever writes the chart out puts them in


def to_vega(chart: alt.TopLevelMixin, rows: Rows, **more: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, with its data and what else it is to have."""
    return {"height": 240, **chart.to_dict(validate=False), "datasets": {DATA.name: list(rows)}, **more}


def build_band(
    rows: Rows, x: str, x_title: str, y: str, y_title: str, log: bool = False, by: str = "label",
    every: Sequence[str] = (),
) -> alt.LayerChart:  # fmt: skip
    """A line with points for each ``by``, and a standard deviation over seeds to both sides.

    A name looks alike on all figures that are given the same ``every``: all names of the report.
    """
    names = list(dict.fromkeys(row[by] for row in rows))
    every = list(dict.fromkeys([*every, *names]))
    places = [every.index(name) for name in names]
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False, nice=False, padding=6)
    ticks = alt.Axis(format="d", values=_whole(rows, x)) if x == "round" else alt.Axis(tickCount=6)
    horizontal = alt.X(f"{x}:Q", title=x_title, scale=scale, axis=ticks)
    vertical = alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=False))
    spread = any(row["high"] > row["low"] for row in rows)
    base = alt.Chart(DATA).encode(x=horizontal, color=_colour(by, names, None, places))
    area = base.mark_area(opacity=0.2, tooltip=False).encode(y=alt.Y("low:Q", title=y_title), y2="high:Q")
    lines = [  # a layer each and no scale of dashes, which would give the legend's points a dashed rim
        alt.Chart(DATA)
        .transform_filter(alt.FieldEqualPredicate(field=by, equal=name))
        .mark_line(color=COLOURS[place % len(COLOURS)], strokeDash=DASHES[place % len(DASHES)])
        .encode(x=horizontal, y=vertical)
        for name, place in zip(names, places)
    ]
    point = base.mark_point(filled=True, opacity=1).encode(
        y=vertical, shape=_scaled(alt.Shape, by, names, SHAPES, places), tooltip=_tooltip([by, x, y, "seeds"])
    )  # fmt: skip
    return alt.layer(*([area] if spread else []), *lines, point)


def build_panels(
    rows: Mapping[str, Rows], x: str, x_title: str, y: str, y_title: str, log: bool, every: Sequence[str]
) -> alt.HConcatChart:
    """``band`` once for each title in ``rows`` that has any, side by side on the same scales, with their data."""
    drawn = [
        build_band(own, x, x_title, y, y_title, log, every=every).properties(
            width=330, height=260, title=title, data=alt.Data(values=list(own))
        )
        for title, own in rows.items()
        if own
    ]
    return alt.hconcat(*drawn).resolve_scale(x="shared", y="shared")


def build_strip(rows: Rows, y_title: str) -> alt.Chart:
    """Every client a point, a row for each model."""
    names = list(dict.fromkeys(row["label"] for row in rows))
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
    """A cell a row of the data; ``x`` and ``y`` in the order in which they come. ``most`` ends the scale of colours."""
    orders = {key: list(dict.fromkeys(row[key] for row in rows)) for key in (x, y)}
    return (
        alt.Chart(DATA, height=step * len(orders[y]))
        .mark_rect()
        .encode(
            x=alt.X(f"{x}:O", title=x_title, sort=orders[x], axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(f"{y}:O", title=y_title, sort=orders[y], axis=alt.Axis(labelOverlap=True)),
            color=alt.Color(
                f"{value}:Q", title=title, legend=alt.Legend(gradientLength=140, format=".2~g"),
                scale=alt.Scale(scheme=HEAT, domain=[0, most or 1e-12 + max(row[value] for row in rows)]),
            ),
            tooltip=_tooltip([x, y, value]),
        )
    )  # fmt: skip


def build_bars(rows: Rows, x: str, x_title: str, part: str, part_title: str, split: str | None = None) -> alt.Chart:
    """A bar for each label, or for each label and ``split``, put together from its parts."""
    names, parts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("label", part))
    chart = (
        alt.Chart(DATA, height=(26 if split is None else 36) * len(names))
        .mark_bar()
        .encode(
            x=alt.X(f"{x}:Q", title=x_title, stack="zero"),
            y=alt.Y("label:N", title=None, sort=names),
            color=_colour(part, parts, part_title),
            tooltip=_tooltip(["label", *([split] if split else []), part, x]),
        )
    )
    return (
        chart
        if split is None
        else chart.encode(yOffset=alt.YOffset(f"{split}:N", sort="descending", scale=alt.Scale(paddingInner=0.12)))
    )


def build_counts(rows: Rows) -> alt.Chart:
    """Faults by round, a colour a kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    return (
        alt.Chart(DATA)
        .mark_bar()
        .encode(
            x=alt.X("round:O", title="round", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("count:Q", title="clients", stack="zero", axis=alt.Axis(tickMinStep=1, format="d")),
            color=_colour("kind", kinds, "what"),
            tooltip=_tooltip(["round", "kind", "count"]),
        )
    )


def _colour(field: str, names: Sequence[str], title: str | None = None, places: Sequence[int] = ()) -> alt.Color:
    return _scaled(alt.Color, field, names, COLOURS, places or range(len(names)), title)


def _scaled(
    channel: Any,
    field: str,
    names: Sequence[str],
    looks: Sequence[Any],
    places: Sequence[int],
    title: str | None = None,
) -> Any:
    """A channel that gives the name at each place the look of that place."""
    scale = alt.Scale(domain=list(names), range=[looks[place % len(looks)] for place in places])
    legend = alt.Legend(symbolOpacity=1) if len(names) > 1 else None  # a band's own is faint
    return channel(f"{field}:N", sort=list(names), title=title, scale=scale, legend=legend)


def _whole(rows: Rows, x: str, most: int = 8) -> list[int]:
    """Ticks at whole numbers, at most about so many."""
    first, last = (math.floor(pick(row[x] for row in rows)) for pick in (min, max))
    step = next(s for s in (k * 10**e for e in range(12) for k in (1, 2, 5)) if (last - first) / s < most)
    return list(range(-(-first // step) * step, last + 1, step))


def _tooltip(keys: Sequence[str]) -> list[alt.Tooltip]:
    numeric = {"value", "error", "drift", "cosine", "mb", "seconds", "epsilon"}
    return [
        alt.Tooltip(f"{key}:Q", format=".4~g", title=key) if key in numeric else alt.Tooltip(f"{key}:N", title=key)
        for key in keys
    ]


def get_page_config() -> dict[str, Any]:
    """Vega-Lite's config in a page: text takes the page's own colour, so light, dark and print need no redrawing."""
    ink, faint = "currentColor", "#80808059"
    return {
        "aria": False,  # the figure says what it shows in one text, and in its table
        "background": None, "font": "system-ui, sans-serif",
        "view": {"stroke": faint},
        "axis": {"labelColor": ink, "titleColor": ink, "gridColor": faint, "domainColor": faint, "tickColor": faint,
                 "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 150},
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "orient": "bottom",
                   "direction": "horizontal", "titleFontWeight": "normal", "labelLimit": 170, "symbolStrokeWidth": 2},
        "point": {"size": 22}, "line": {"strokeWidth": 1.8},
    }  # fmt: skip


def get_screen_config() -> dict[str, Any]:
    """Vega-Lite's config of a picture on its own: black on white, in the sizes of a page."""
    return {"background": "white", "title": {"fontSize": 11, "fontWeight": "normal"}, "point": {"size": 22},
            "line": {"strokeWidth": 1.6}}  # fmt: skip


def get_paper_config() -> dict[str, Any]:
    """The same on paper: black on white, 8 points."""
    small = {"labelFontSize": 7, "titleFontSize": 8, "titleFontWeight": "normal"}
    return {
        "background": "white", "font": "Helvetica, Arial, DejaVu Sans, sans-serif",
        "axis": {**small, "labelLimit": 90, "gridColor": "#dddddd"},
        "legend": {**small, "orient": "bottom", "direction": "horizontal", "columns": 3, "labelLimit": 80,
                   "symbolSize": 30},
        "point": {"size": 8}, "line": {"strokeWidth": 1.1},
    }  # fmt: skip
