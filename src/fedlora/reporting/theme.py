"""How figures look: colours that hold on white and on black, sizes for a page and for a paper's column."""

from typing import Any

COLOURS = (  # each at least 3 : 1 against white and against the dark ground
    "#2f7fc4", "#cf6a10", "#2f9247", "#d64545", "#8a63d2", "#8f6a3d", "#cf4a92", "#14888b", "#767b81", "#83851c",
)  # fmt: skip
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2], [4, 4])  # lines differ by more than colour
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
LIGHT, DARK = "#ffffff", "#14171a"  # the page's grounds, see page.css
HEAT = "viridis"
MM = 72 / 25.4  # points in a millimetre: one unit of a figure is a point on paper


def page() -> dict[str, Any]:
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


def paper() -> dict[str, Any]:
    """The same on paper: black on white, 8 points."""
    small = {"labelFontSize": 7, "titleFontSize": 8, "titleFontWeight": "normal"}
    return {
        "background": "white", "font": "Helvetica, Arial, DejaVu Sans, sans-serif",
        "axis": {**small, "labelLimit": 90, "gridColor": "#dddddd"},
        "legend": {**small, "orient": "bottom", "direction": "horizontal", "columns": 3, "labelLimit": 80,
                   "symbolSize": 30},
        "point": {"size": 8}, "line": {"strokeWidth": 1.1},
    }  # fmt: skip
