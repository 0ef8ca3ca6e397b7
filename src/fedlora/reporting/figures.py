"""The figures of a report, from the tables of its runs; a figure without data is a sentence with the reason."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import altair as alt

from fedlora.files import write
from fedlora.reporting import charts
from fedlora.reporting.charts import distinct
from fedlora.reporting.load import Run
from fedlora.reporting.tables import by_round, totals
from fedlora.reporting.tables.comparison import describe_coverage
from fedlora.runs.table import Column, Table, group_by

LINES = 10  # on one figure: more cannot be distinguished
POINTS = 480  # marks on one figure
CELLS = 3000  # of a heat map
MAPS = 6  # heat maps of layers
MEGABYTES = "MB sent and received, all clients"

Draw = Callable[[Sequence[dict[str, Any]]], Any]


@dataclass(frozen=True)
class Figure:
    """One figure: its chart, the table of its data, and its texts."""

    name: str  # a file's name
    title: str
    caption: str
    table: Table  # only the rows that are drawn
    chart: alt.TopLevelMixin | None = None  # None: without data; ``caption`` has the reason
    mark: str = "symbol"  # the mark of a row: "symbol" or "rect"
    remark: str = ""  # a text above the picture in a file, which has no caption

    @property
    def alt(self) -> str:
        """The alternative text of the figure."""
        lines = [str(label) for label in distinct(row for row in self.table.rows if "label" in row)]
        names = f" Shown: {', '.join(lines)}." if lines else ""
        return f"{self.title}.{names} {len(self.table.rows)} points; the table below has them."


def draw_figures(runs: Sequence[Run]) -> list[Figure]:
    """Draw all figures of these runs, in the order of a report."""
    return [figure for draw in SECTIONS for figure in draw(runs)]


def list_labels(runs: Sequence[Run]) -> list[str]:
    """List all labels; a method has its colour by its place among them."""
    return list(dict.fromkeys(run.label for run in runs))


def draw_curves(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw the metric by round, by megabyte and by second, of the shared and of the clients' own models."""
    table, metric = by_round.tabulate_curves(runs), by_round.get_metric(runs)
    axes = {"round": ("round", "round", False), "megabyte": ("mb", MEGABYTES, True),
            "second": ("seconds", "seconds, all phases", False)}  # fmt: skip
    for model, what in by_round.MODELS.items():
        rows = [row for row in table.rows if row["model"] == model]
        missing = by_round.describe_missing(runs) if model == "clients" else ""
        why = f"No round of these runs has been evaluated for the {what} yet." if model == "clients" else (
            "None of these methods has a shared model of its own to score, or no round was evaluated yet."
        )  # fmt: skip
        for name, (x, x_title, is_log) in axes.items():
            positive = [row for row in rows if not is_log or row[x] > 0]
            gone = "; methods that send nothing have no place on this scale" if len(positive) < len(rows) else ""
            spread = " Band: a standard deviation over seeds." if any(row["seeds"] > 1 for row in positive) else ""
            caption = f"{what[0].upper()}{what[1:]}{gone}.{spread}{missing}"
            title = f"{metric.capitalize()} by {name}, {what.partition(',')[0]}"
            axis = {"x": x, "x_title": x_title, "y": "value", "y_title": metric, "log": is_log}
            shown = replace(table, title=title, note=caption, rows=positive)
            figure = _draw_lines(f"{model}-by-{name}", runs, shown, why, runs[0].higher, **axis)
            yield replace(figure, remark=missing.strip())


def draw_comparison(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write ``METRIC-by-round`` and ``METRIC-by-megabyte`` as PNG and SVG into ``out``; returns the PNGs.

    A panel for each kind of model, and a line for each method: the mean over its seeds, with a standard deviation to
    both sides. Runs that diverged are left out, and nothing is written if no round was evaluated.
    """
    import vl_convert

    whole = [run for run in runs if run.failure is None]
    rows = by_round.tabulate_curves(whole).rows if whole else []
    axes = {"round": ("round", "round", False), "megabyte": ("mb", f"{MEGABYTES} (log scale)", True)}
    spread = ", mean ± standard deviation over seeds" if any(row["seeds"] > 1 for row in rows) else ""
    lines = [f"{run.label}, seed {run.seed}: {text}" for run in whole if (text := run.digest.means)]
    lines[8:] = [f"and {len(lines) - 8} more runs"] if len(lines) > 8 else []
    title = {"title": {"text": lines, "anchor": "start", "fontSize": 10}} if lines else {}
    paths = []
    for name, (x, x_title, is_log) in axes.items() if rows else ():
        panels = {what: [row for row in rows if row["model"] == model and (not is_log or row[x] > 0)]
                  for model, what in reversed(by_round.MODELS.items())}  # fmt: skip
        y_title = f"{by_round.get_metric(whole)}{spread}"
        chart = charts.build_panels(panels, x, x_title, "value", y_title, is_log, list_labels(whole))
        spec = {**chart.to_dict(validate=False), **title, "config": charts.SCREEN}
        path = out / f"{whole[0].metric}-by-{name}"
        svg = vl_convert.vegalite_to_svg(spec)
        write(path.with_suffix(".svg"), svg.encode())
        write(path.with_suffix(".png"), vl_convert.svg_to_png(svg, scale=2.0))
        paths.append(path.with_suffix(".png"))
    return paths


def draw_clients(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw the distribution over clients, and name the worst ones."""
    table = totals.tabulate_clients(runs)
    worst = dict(list(totals.find_worst(table, runs[0].higher).items())[:LINES])
    lowest = "; ".join(f"{k}: {', '.join(f'client {c} ({v:.3f})' for c, v in pairs)}" for k, pairs in worst.items())
    rows = _pick_quantiles([row for row in table.rows if row["label"] in worst])
    left = " Of each, evenly spaced clients in order of their figure." if len(rows) < len(table.rows) else ""
    few = [f"{who} in {run.name}" for run in runs if (who := describe_coverage(run)) != "all"]
    remark = f"Scored were only {'; '.join(few[:LINES])}." if few else ""
    caption = f"{table.note}{left} The worst clients: {lowest}.{' ' * bool(remark)}{remark}"
    why = "No client's own score is in these runs: no round has been evaluated, or scores stay with the clients."
    strip = partial(charts.build_strip, y_title=by_round.get_metric(runs))
    yield replace(_draw("clients", table, rows, caption, why, strip), remark=remark)


def draw_errors(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw the aggregation error of each method, and of all methods on the same uploads."""
    table, y_title = by_round.tabulate_errors(runs), "relative error"
    why = ("These runs have no aggregation errors: they need evaluation.measure = true, and uploads that the server "
           "sees; [privacy] leaves them out unless privacy.figures is true.")  # fmt: skip
    labels = distinct(table.rows)
    if len(labels) == 1:
        shown, by = replace(table, note=f"{labels[0]}: {table.note}"), "measure"
    else:
        served = [row for row in table.rows if row["measure"] == by_round.MEASURES["served"]]
        shown, by = replace(table, rows=served), "label"
    yield _draw_lines("errors", runs, shown, why, y="error", y_title=y_title, by=by)
    why = "To see what every method makes of the same uploads, run fedlora compare CONFIG --oracle."
    yield _draw_lines("oracle", runs, by_round.tabulate_oracle_by_round(runs), why, y="error", y_title=y_title)


def draw_layers(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw the error by weight and round, a map for each method."""
    table = by_round.tabulate_layers(runs)
    groups = group_by(table.rows, lambda row: row["label"])
    if not groups:
        yield Figure("layers", table.title, "These runs hold no aggregation errors by weight.", table)
    most = max([1e-9, *(row["error"] for row in table.rows)])  # one scale of colours, so that maps can be compared
    scale = " One scale for all methods." if len(groups) > 1 else ""
    more = f" {len(groups) - MAPS} more methods are not drawn." if len(groups) > MAPS else ""
    for label, rows in list(groups.items())[:MAPS]:
        drawn, left = _select_weights(rows)
        chart = charts.build_heat_map(drawn, "round", "round", "weight", None, "error", "relative error", most=most)
        file = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:40] or "unnamed"
        name = f"layers-{file}" if len(groups) > 1 else "layers"
        caption = f"{table.note}{scale}{left}{more}"
        yield Figure(name, f"{table.title}: {label}", caption, replace(table, rows=drawn), chart, "rect")


def _select_weights(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Select as many weights as a map has room for, in the model's order, and remove the common prefix of names."""
    parts = distinct(rows, "part")
    selected = parts[: max(1, CELLS // max(1, len(distinct(rows, "round"))))]
    levels = zip(*(part.split(".") for part in parts))
    start = next((i for i, names in enumerate(levels) if len(set(names)) > 1), 0)
    few = [{**row, "weight": ".".join(row["part"].split(".")[start:])} for row in rows if row["part"] in selected]
    left = f" The first {len(selected)} of {len(parts)} weights." if len(selected) < len(parts) else ""
    return sorted(few, key=lambda row: (parts.index(row["part"]), row["round"])), left


def draw_drift(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw client drift, and the cosine similarity of A and of B."""
    why = "These runs hold no client drift: evaluation.measure was off, or uploads were hidden."
    yield _draw_lines("drift", runs, by_round.tabulate_drift(runs), why, y="drift", y_title="client drift")
    table = by_round.tabulate_cosines(runs)
    why = ("These runs hold no cosine similarity of A and B: their adapters are no pairs of one rank, uploads were "
           "hidden, or an older fedlora wrote them; fedlora similarity RUN measures a finished run.")  # fmt: skip
    for leaf in "AB":
        title = f"Cosine similarity of the clients' {leaf}"
        shown = replace(table, title=title, rows=[row for row in table.rows if row["factor"] == leaf])
        yield _draw_lines(f"cosine-{leaf}", runs, shown, why, True, y="cosine", y_title="cosine")


def draw_labels(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw the labels of each client."""
    table = totals.tabulate_labels(runs)
    first = distinct(table.rows, "client")[: max(1, CELLS // max(1, len(distinct(table.rows, "target"))))]
    rows = [row for row in table.rows if row["client"] in set(first)]
    left = f" The first {len(first)} clients are drawn." if len(rows) < len(table.rows) else ""
    why = ("These runs do not say which labels clients hold: their rows have none, lie with the clients, are covered "
           "by [privacy], or an older fedlora wrote them.")  # fmt: skip
    heat_map = partial(charts.build_heat_map, x="target", x_title="label", y="client", y_title="client", value="rows",
                       title="rows", step=14)  # fmt: skip
    yield _draw("labels", table, rows, table.note + left, why, heat_map, "rect")


def draw_costs(runs: Sequence[Run]) -> Iterator[Figure]:
    """Draw bytes by part, time by phase, faults and epsilon."""
    sent, time, faults = totals.tabulate_bytes(runs), totals.tabulate_phases(runs), totals.tabulate_faults(runs)
    few = distinct(time.rows)[: 2 * LINES]
    left = f" The first {len(few)} methods." if len(list_labels(runs)) > len(few) else ""
    mb, seconds = ([row for row in table.rows if row["label"] in few] for table in (sent, time))
    bars = partial(charts.build_bars, x="mb", x_title="MB (upper bar: up, lower: down)", part="part", part_title="part",
                   split="direction")  # fmt: skip
    yield _draw("bytes", sent, mb, sent.note + left, "Nothing was sent in these runs.", bars, "rect")
    bars = partial(charts.build_bars, x="seconds", x_title="seconds", part="phase", part_title="phase")
    yield _draw("time", time, seconds, time.note + left, "No round has ended yet.", bars, "rect")
    kinds = ", ".join(f"{count} {kind}" for kind, count in totals.count_faults(runs).items())
    caption = f"All runs together: {kinds}. Each is in the table of faults below."
    table = replace(faults, columns=(*faults.columns, Column("count", "clients", 0)))
    why = "No upload was quarantined and no client was away."
    yield _draw("faults", table, _count_by_round(faults), caption, why, charts.build_counts, "rect")
    why = "These runs give no guarantee of privacy that could be drawn: [privacy] is off, or adds no noise."
    yield _draw_lines("epsilon", runs, by_round.tabulate_epsilon(runs), why, y="epsilon", y_title="ε")


SECTIONS = (draw_curves, draw_clients, draw_errors, draw_layers, draw_drift, draw_labels, draw_costs)


def _draw(name: str, table: Table, rows: Sequence[Any], caption: str, why: str, draw: Draw, mark="symbol") -> Figure:
    """Draw a figure of these rows; without rows, ``why`` is its caption."""
    if not rows:
        return Figure(name, table.title, why, replace(table, rows=[]))
    return Figure(name, table.title, caption, replace(table, rows=list(rows)), draw(rows), mark)


def _draw_lines(
    name: str, runs: Sequence[Run], table: Table, why: str, higher: bool = False, by: str = "label", x: str = "round",
    x_title: str = "round", **axes: Any,
) -> Figure:  # fmt: skip
    """Draw a table as lines: the best ones if there are too many, and means of neighbouring rounds."""
    ends = {line: rows[-1][axes["y"]] for line, rows in group_by(table.rows, lambda row: row[by]).items()}
    best = sorted(ends, key=ends.__getitem__, reverse=higher)[:LINES]
    rows = [row for row in table.rows if row[by] in best]
    few = thin_out(rows, (by,), POINTS)
    left = ""
    if len(best) < len(ends):
        left = (f" Of {len(ends)} lines, the {LINES} ahead at their last point are drawn; that alone does not make "
                "them better.")  # fmt: skip
    left += " Neighbouring rounds are drawn as their mean." if len(few) < len(rows) else ""
    band = partial(charts.build_band, x=x, x_title=x_title, by=by, every=list_labels(runs), **axes)
    return _draw(name, table, few, table.note + left, why, band)


def thin_out(rows: Sequence[dict[str, Any]], line: Sequence[str], most: int, x: str = "round") -> list[dict[str, Any]]:
    """Reduce to about ``most`` rows: along each line (rows equal in ``line``) neighbours become their mean.

    Every line keeps its last row. A text is that of the last row of its neighbours.
    """
    width = math.ceil(len(rows) / most)
    if width <= 1:
        return list(rows)
    thinned = []
    for group in group_by(rows, lambda row: tuple(row[key] for key in line)).values():
        group = sorted(group, key=lambda row: row[x])
        thinned += [_average(group[i : i + width]) for i in range(0, len(group) - 1, width)] + [group[-1]]
    return thinned


def _average(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    return {**rows[-1], **{key: fmean(row[key] for row in rows if row[key] is not None) for key in numbers}}


def _pick_quantiles(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, or if they are too many, evenly spaced ones of each label in order, with both ends."""
    groups = group_by(rows, lambda row: row["label"])
    picked = []
    for group in groups.values():
        ordered, most = sorted(group, key=lambda row: row["value"]), max(5, POINTS // len(groups))
        step = max(1, -(-len(ordered) // most))
        picked += group if step == 1 else [*ordered[:-1:step], ordered[-1]]
    return picked


def _count_by_round(table: Table) -> list[dict[str, Any]]:
    """Count the faults of each kind in each stretch of rounds, of which there are at most about a hundred."""
    width = -(-max((row["round"] for row in table.rows), default=1) // 100)
    groups = group_by(table.rows, lambda row: (row["kind"], (row["round"] - 1) // width * width + 1))
    counts = [{"round": round, "kind": kind, "count": len(group)} for (kind, round), group in groups.items()]
    return sorted(counts, key=lambda row: (row["kind"], row["round"]))
