"""The figures of a report, from the tables of its runs; what a run does not hold is a sentence and no figure."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt

from fedlora.files import write
from fedlora.reporting import charts
from fedlora.reporting.load import Run
from fedlora.reporting.tables import by_round as by_round
from fedlora.reporting.tables import totals
from fedlora.reporting.tables.comparison import describe_coverage
from fedlora.runs.table import Column, Table, group_by, mean_std

LINES = 10  # on one figure: more cannot be told apart
POINTS = 480  # marks on one figure
CELLS = 3000  # of a heat map
MAPS = 6  # heat maps of layers
MEGABYTES = "MB sent and received, all clients"

Draw = Callable[[Sequence[dict[str, Any]]], Any]


@dataclass(frozen=True)
class Figure:
    """One figure: its chart, the table that it draws, and what it says in words."""

    name: str  # a file's name
    title: str
    caption: str
    table: Table  # with the rows that are drawn
    chart: alt.TopLevelMixin | None = None  # None: ``caption`` says why there is nothing to draw
    mark: str = "symbol"  # what each row of the data is drawn as: "symbol" or "rect"
    remark: str = ""  # what the picture must say itself where it stands without its caption

    @property
    def alt(self) -> str:
        """The figure for those who do not see it."""
        lines = list(dict.fromkeys(str(row["label"]) for row in self.table.rows if "label" in row))
        names = f" Shown: {', '.join(lines)}." if lines else ""
        return f"{self.title}.{names} {len(self.table.rows)} points; the table below has them."


def draw_figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures of these runs, in the order of a report."""
    return [figure for make in SECTIONS for figure in make(runs)]


def draw_curves(runs: Sequence[Run]) -> Iterator[Figure]:
    """The metric by round, by megabyte and by second, of the shared and of the clients' own models."""
    table, metric, every = by_round.tabulate_curves(runs), by_round.get_metric(runs), list_labels(runs)
    axes = {"round": ("round", "round", False), "megabyte": ("mb", MEGABYTES, True),
            "second": ("seconds", "seconds, all phases", False)}  # fmt: skip
    for model, what in by_round.MODELS.items():
        rows = [row for row in table.rows if row["model"] == model]
        for name, (x, x_title, log) in axes.items():
            some = [row for row in rows if not log or row[x] > 0]
            gone = "; what sent nothing has no place on this scale" if len(some) < len(rows) else ""
            spread = " Band: a standard deviation over seeds." if any(row["seeds"] > 1 for row in some) else ""
            few = by_round.describe_missing(runs) if model == "clients" else ""
            caption = f"{what[0].upper()}{what[1:]}{gone}.{spread}{few}"
            draw = partial(charts.build_band, x=x, x_title=x_title, y="value", y_title=metric, log=log, every=every)
            why = f"No round of these runs has been evaluated for the {what} yet." if model == "clients" else (
                "None of these methods has a shared model of its own to score, or no round was evaluated yet."
            )  # fmt: skip
            title = f"{metric.capitalize()} by {name}, {what.partition(',')[0]}"
            figure = _lines(f"{model}-by-{name}", title, caption, table, some, draw, why, runs[0].higher)
            yield replace(figure, remark=few.strip())


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
    written = []
    for name, (x, title, is_log) in axes.items() if rows else ():
        panels = {what: [row for row in rows if row["model"] == model and (not is_log or row[x] > 0)]
                  for model, what in reversed(by_round.MODELS.items())}  # fmt: skip
        chart = charts.build_panels(
            panels, x, title, "value", f"{by_round.get_metric(whole)}{spread}", is_log, list_labels(whole)
        )
        spec = {**chart.to_dict(validate=False), **_missing(whole), "config": charts.get_screen_config()}
        path = out / f"{whole[0].metric}-by-{name}"
        svg = vl_convert.vegalite_to_svg(spec)
        write(path.with_suffix(".svg"), svg.encode())
        write(path.with_suffix(".png"), vl_convert.svg_to_png(svg, scale=2.0))
        written.append(path.with_suffix(".png"))
    return written


def _missing(runs: Sequence[Run], most: int = 8) -> dict[str, Any]:
    """A line above the panels for each run whose means are not over all clients."""
    lines = [f"{run.label}, seed {run.seed}: {text}" for run in runs if (text := run.digest.means)]
    more = [f"and {len(lines) - most} more runs"] if len(lines) > most else []
    return {"title": {"text": [*lines[:most], *more], "anchor": "start", "fontSize": 10}} if lines else {}


def draw_clients(runs: Sequence[Run]) -> Iterator[Figure]:
    """The distribution over clients, the worst ones named."""
    table = totals.tabulate_clients(runs)
    named = totals.find_worst(table, runs[0].higher)
    shown = list(named.items())[:LINES]
    lowest = "; ".join(f"{k}: {', '.join(f'client {c} ({v:.3f})' for c, v in own)}" for k, own in shown)
    rows = _quantiles([row for row in table.rows if row["label"] in dict(shown)])
    left = " Of each, evenly spaced clients in order of their figure." if len(rows) < len(table.rows) else ""
    few = [f"{who} in {run.name}" for run in runs if (who := describe_coverage(run)) != "all"]
    fewer = f"Scored were only {'; '.join(few[:LINES])}." if few else ""
    caption = f"{table.note}{left} The worst clients: {lowest}.{' ' * bool(fewer)}{fewer}"
    why = "No client's own score is in these runs: no round has been evaluated, or scores stay with the clients."
    figure = _one("clients", table, rows, caption, why, partial(charts.build_strip, y_title=by_round.get_metric(runs)))
    yield replace(figure, remark=fewer)


def draw_errors(runs: Sequence[Run]) -> Iterator[Figure]:
    """The aggregation error: of each method, and of all methods on the same uploads."""
    table = by_round.tabulate_errors(runs)
    why = ("These runs have no aggregation errors: they need evaluation.measure = true, and uploads that the server "
           "sees; [privacy] leaves them out unless privacy.figures is true.")  # fmt: skip
    labels = list(dict.fromkeys(row["label"] for row in table.rows))
    measure = f"{labels[0]}: " if len(labels) == 1 else ""
    rows = table.rows if measure else [r for r in table.rows if r["measure"] == by_round.MEASURES["served"]]
    by = "measure" if measure else "label"
    draw = partial(
        charts.build_band,
        x="round",
        x_title="round",
        y="error",
        y_title="relative error",
        by=by,
        every=list_labels(runs),
    )
    yield _lines("errors", table.title, f"{measure}{table.note}", table, rows, draw, why, False, by)
    asked = by_round.tabulate_oracle_by_round(runs)
    ask = "To see what every method makes of the same uploads, run fedlora compare CONFIG --oracle."
    yield _lines("oracle", asked.title, asked.note, asked, asked.rows, partial(draw, by="label"), ask, False)


def draw_layers(runs: Sequence[Run]) -> Iterator[Figure]:
    """The error by weight and round, a map for each method."""
    table = by_round.tabulate_layers(runs)
    groups = group_by(table.rows, lambda row: row["label"])
    if not groups:
        yield Figure("layers", table.title, "These runs hold no aggregation errors by weight.", table)
    most = max((row["error"] for row in table.rows), default=0.0)  # one scale of colours: maps can be compared
    more = f" {len(groups) - MAPS} more methods are not drawn." if len(groups) > MAPS else ""
    for label, rows in list(groups.items())[:MAPS]:
        some, left = _some_parts(rows)
        chart = charts.build_heat_map(
            some, "round", "round", "weight", None, "error", "relative error", most=max(most, 1e-9)
        )
        name = f"layers-{_file(label)}" if len(groups) > 1 else "layers"
        caption = f"{table.note}{' One scale for all methods.' if len(groups) > 1 else ''}{left}{more}"
        yield Figure(name, f"{table.title}: {label}", caption, replace(table, rows=some), chart, "rect")


def _some_parts(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Rows of as many weights as a map has room for, in the model's order, without what all names begin with."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    kept = parts[: max(1, CELLS // max(1, len({row["round"] for row in rows})))]
    levels = zip(*(part.split(".") for part in parts))
    start = next((i for i, found in enumerate(levels) if len(set(found)) > 1), 0)
    few = [{**row, "weight": ".".join(row["part"].split(".")[start:])} for row in rows if row["part"] in kept]
    left = f" The first {len(kept)} of {len(parts)} weights." if len(kept) < len(parts) else ""
    return sorted(few, key=lambda row: (parts.index(row["part"]), row["round"])), left


def draw_drift(runs: Sequence[Run]) -> Iterator[Figure]:
    """Client drift, and the cosine similarity of A and of B."""
    table = by_round.tabulate_drift(runs)
    why = "These runs hold no client drift: evaluation.measure was off, or uploads were not to be seen."
    over_rounds = partial(charts.build_band, x="round", x_title="round", every=list_labels(runs))
    draw = partial(over_rounds, y="drift", y_title="client drift")
    yield _lines("drift", table.title, table.note, table, table.rows, draw, why, False)
    alike = by_round.tabulate_cosines(runs)
    why = ("These runs hold no cosine similarity of A and B: their adapters are no pairs of one rank, uploads were "
           "hidden, or an older fedlora wrote them; fedlora similarity RUN looks at a finished run.")  # fmt: skip
    for leaf in "AB":
        rows = [row for row in alike.rows if row["factor"] == leaf]
        cosine = partial(over_rounds, y="cosine", y_title="cosine")
        yield _lines(
            f"cosine-{leaf}", f"Cosine similarity of the clients' {leaf}", alike.note, alike, rows, cosine, why, True
        )


def draw_labels(runs: Sequence[Run]) -> Iterator[Figure]:
    """The labels of each client."""
    table = totals.tabulate_labels(runs)
    names = list(dict.fromkeys(row["target"] for row in table.rows))
    kept = set(list(dict.fromkeys(row["client"] for row in table.rows))[: max(1, CELLS // max(1, len(names)))])
    rows = [row for row in table.rows if row["client"] in kept]
    left = f" The first {len(kept)} clients are drawn." if len(rows) < len(table.rows) else ""
    why = ("These runs do not say which labels clients hold: their rows have none, lie with the parties, are covered "
           "by [privacy], or an older fedlora wrote them.")  # fmt: skip
    draw = partial(
        charts.build_heat_map,
        x="target",
        x_title="label",
        y="client",
        y_title="client",
        value="rows",
        title="rows",
        step=14,
    )
    yield _one("labels", table, rows, table.note + left, why, draw, "rect")


def draw_costs(runs: Sequence[Run]) -> Iterator[Figure]:
    """Bytes by part, time by phase, faults, epsilon."""
    sent, time, lost, privacy = (
        totals.tabulate_bytes(runs),
        totals.tabulate_phases(runs),
        totals.tabulate_faults(runs),
        by_round.tabulate_epsilon(runs),
    )
    few = list(dict.fromkeys(row["label"] for row in time.rows))[: 2 * LINES]
    left = f" The first {len(few)} methods." if len({run.label for run in runs}) > len(few) else ""
    mb, seconds = ([row for row in table.rows if row["label"] in few] for table in (sent, time))
    bars = partial(charts.build_bars, x="mb", x_title="MB (upper bar: up, lower: down)", part="part", part_title="part")
    bars = partial(bars, split="direction")
    yield _one("bytes", sent, mb, sent.note + left, "Nothing was sent in these runs.", bars, "rect")
    phases = partial(charts.build_bars, x="seconds", x_title="seconds", part="phase", part_title="phase")
    yield _one("time", time, seconds, time.note + left, "No round has ended yet.", phases, "rect")
    kinds = ", ".join(f"{many} {kind}" for kind, many in totals.count_faults(runs).items())
    caption = f"All runs together: {kinds}. Each is in the table of faults below."
    why = "No upload was quarantined and no client was away."
    many = replace(lost, columns=(*lost.columns, Column("count", "clients", 0)))
    yield _one("faults", many, _by_round(lost), caption, why, charts.build_counts, "rect")
    draw = partial(charts.build_band, x="round", x_title="round", y="epsilon", y_title="ε", every=list_labels(runs))
    why = "These runs give no guarantee of privacy that could be drawn: [privacy] is off, or adds no noise."
    yield _lines("epsilon", privacy.title, privacy.note, privacy, privacy.rows, draw, why, False)


def list_labels(runs: Sequence[Run]) -> list[str]:
    """All labels: a method has its colour by its place among them."""
    return list(dict.fromkeys(run.label for run in runs))


SECTIONS = (draw_curves, draw_clients, draw_errors, draw_layers, draw_drift, draw_labels, draw_costs)


def _one(name: str, table: Table, rows: Sequence[Any], caption: str, why: str, draw: Draw, mark="symbol") -> Figure:
    """A figure of these rows, or the sentence why there is none."""
    if not rows:
        return Figure(name, table.title, why, replace(table, rows=[]))
    return Figure(name, table.title, caption, replace(table, rows=list(rows)), draw(rows), mark)


def _lines(
    name: str, title: str, caption: str, table: Table, rows: Sequence[Any], draw: Draw, why: str, higher: bool,
    by: str = "label",
) -> Figure:  # fmt: skip
    """A figure of lines: the best ones where there are too many, and neighbouring rounds as their mean."""
    key = next((c.key for c in table.columns if c.key in ("value", "error", "drift", "cosine", "epsilon")), "value")
    ends = {line: own[-1][key] for line, own in group_by(rows, lambda row: row[by]).items()}
    best = sorted(ends, key=ends.__getitem__, reverse=higher)[:LINES]
    some = [row for row in rows if row[by] in best]
    few = thin_out(some, (by,), POINTS)
    left = (
        f" Of {len(ends)} lines, the {LINES} ahead at their last point are drawn; that alone does not make them better."
        if len(best) < len(ends)
        else ""
    )
    left += " Neighbouring rounds are drawn as their mean." if len(few) < len(some) else ""
    return _one(name, replace(table, title=title), few, caption + left, why, draw)


def thin_out(rows: Sequence[dict[str, Any]], line: Sequence[str], most: int, x: str = "round") -> list[dict[str, Any]]:
    """Reduce to about ``most`` rows: along each line (rows alike in ``line``) neighbours become their mean.

    Every line keeps its last row. A text is that of the last row of its neighbours.
    """
    width = math.ceil(len(rows) / most)
    if width <= 1:
        return list(rows)
    thinned = []
    for own in group_by(rows, lambda row: tuple(row[key] for key in line)).values():
        own = sorted(own, key=lambda row: row[x])
        thinned += [_mean(own[i : i + width]) for i in range(0, len(own) - 1, width)] + [own[-1]]
    return thinned


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    means = {key: mean_std(row[key] for row in rows) for key in numbers}
    return {**rows[-1], **{key: found.mean for key, found in means.items() if found is not None}}


def _quantiles(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, or where they are too many for points, every so many of each label's in order, and both ends."""
    groups = group_by(rows, lambda row: row["label"])
    found = []
    for own in groups.values():
        ordered, most = sorted(own, key=lambda row: row["value"]), max(5, POINTS // len(groups))
        step = max(1, -(-len(ordered) // most))
        found += own if step == 1 else [*ordered[:-1:step], ordered[-1]]
    return found


def _by_round(table: Table) -> list[dict[str, Any]]:
    """How many faults of each kind a stretch of rounds has, at most about a hundred stretches."""
    width = -(-max((row["round"] for row in table.rows), default=1) // 100)
    groups = group_by(table.rows, lambda row: (row["kind"], (row["round"] - 1) // width * width + 1))
    found = [{"round": round, "kind": kind, "count": len(own)} for (kind, round), own in groups.items()]
    return sorted(found, key=lambda row: (row["kind"], row["round"]))


def _file(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:40] or "unnamed"
