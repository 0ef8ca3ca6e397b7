"""A run under way on a terminal: a picture that is drawn again and again, or lines where nobody looks."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedlora.runs.attendance import count_scored, describe_means, name_faults
from fedlora.runs.progress_file import LOADING, RUNNING, WAITING, ProgressReader, RunStatus
from fedlora.runs.record import round_figures
from fedlora.text import display_safe

LATELY = 5  # rounds that the time left is taken from
BARS = "▁▂▃▄▅▆▇█"
DOING = {
    "starting": "starting", "step": "training", "turn": "training", "evaluation": "scored", "round": "scored",
    "waiting": "waiting", "absent": "training", "quarantined": "training", "node": "training",
}  # fmt: skip
Cell = Callable[[Mapping[str, float]], str]


def _figure(name: str, form: str = "{:.4f}", scale: float = 1.0) -> Cell:
    return lambda found: form.format(found[name] / scale) if name in found else "–"


def _left_out(found: Mapping[str, float]) -> str:
    gone = sum(int(found.get(f"faults/{name}", 0)) for name in ("absent", "quarantined"))
    return str(gone) if gone else "–"


def list_columns(metric: str) -> list[tuple[str, Cell]]:
    """Headings and cells of a round's row, the most wanted first: a narrow terminal shows as many as fit."""
    return [
        ("round", _figure("round", "{:.0f}")),
        (f"own {metric}", _figure("clients/mean")),
        ("loss", _figure("train/loss")),
        (f"global {metric}", _figure(f"global/{metric}")),
        ("worst", _figure("clients/worst")),
        ("error", _figure("aggregation/served", "{:.1e}")),
        ("MB up", _figure("bytes_up/total", "{:.2f}", 1e6)),
        ("MB down", _figure("bytes_down/total", "{:.2f}", 1e6)),
        ("clients", _figure("train/clients", "{:.0f}")),
        ("left out", _left_out),
        ("quarantined", _figure("faults/quarantined", "{:.0f}")),
        ("not scored", _figure("faults/unscored", "{:.0f}")),
        ("ε", _figure("privacy/epsilon", "{:.2f}")),
        ("seconds", _figure("seconds/total", "{:.1f}")),
    ]


def _rows(at: RunStatus) -> list[dict[str, float]]:
    return [{"round": record["round"], **round_figures(record)} for record in at.records]


def estimate_remaining(at: RunStatus, now: float) -> float | None:
    """Seconds until the last round ends, if the rest goes as the last rounds went; None before there is one."""
    lately = [s for record in at.records[-LATELY:] if (s := record.get("seconds", {}).get("total"))]
    if not lately or at.state != RUNNING:
        return None
    left = at.progress["rounds"] - len(at.records)
    return max(0.0, fmean(lately) * left - max(0.0, now - at.progress["at"]))


def format_duration(seconds: float) -> str:
    """So long, in words short enough for a line."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{timedelta(minutes=round(seconds / 60))!s}"[:-3] + " h"


def draw_status(at: RunStatus, name: str, width: int, height: int, now: float, unicode: bool = True) -> RenderableType:
    """What a terminal of so many columns and lines shows of a run."""
    metric = str(at.progress.get("metric", "accuracy"))
    said_of_it = list(_head(at, name, now))
    head: list[RenderableType] = [Text(text, overflow="fold") for text in said_of_it]
    if at.progress:
        head.insert(1, _bar(len(at.records), at.progress["rounds"], width))
    rows = _rows(at)
    curves = [_line(text) for text in _curves(rows, metric, width)] if unicode else []
    said = [_line(display_safe(text)) for text in at.progress.get("said", [])[-4:]]
    folded = sum(len(text) // width for text in said_of_it)
    room = height - len(head) - 2 * folded - len(curves) - len(said) - 3
    table = [_table(rows[-max(1, room) :], metric, width)] if rows else []
    return Group(*head, *curves, *table, *said)


def _bar(done: int, rounds: int, width: int) -> Table:
    """In a grid, since a bar alone does not end its line."""
    grid = Table.grid()
    grid.add_row(ProgressBar(rounds, done, width=min(width, 60)))
    return grid


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _head(at: RunStatus, name: str, now: float) -> Iterator[str]:
    yield ", ".join([display_safe(name), *([display_safe(at.progress["title"])] if "title" in at.progress else [])])
    if at.state == WAITING:
        yield "waiting for the run to begin; Ctrl-C leaves"
    if at.state == LOADING:
        yield "the model and the data are being loaded"
    if at.progress:
        yield describe_state(at)
        yield from describe_attendance(at)
        yield _times(at, now)


def describe_attendance(at: RunStatus) -> Iterator[str]:
    """Who is left out now, and whom the means over clients of the rounds are over; nothing where all are there."""
    found, of = at.progress.get("missing") or {}, at.progress.get("clients", 0)
    if count := found.get("count"):
        named = [display_safe(text) for text in found["first"]]
        more = f"; and {count - len(named)} more clients" if count > len(named) else ""
        yield f"left out {'at its end' if at.is_over else 'now'}: {'; '.join(named)}{more}"
    if text := describe_means([(r["round"], count_scored(r)) for r in at.records if "clients" in r], of):
        yield f"clients' own models: {text}"


def describe_state(at: RunStatus) -> str:
    """Where a run stands, in a line."""
    said, done = at.progress, f"{len(at.records)} of {at.progress['rounds']} rounds"
    if at.is_over:
        why = f": {display_safe(said['error'])}" if said.get("error") else ""
        return f"{at.state} after {done}{why}"
    who = "" if said.get("client") is None else f", client {said['client']}"
    loss = "" if said.get("loss") is None else f", loss {said['loss']:.4f}"
    where = f"round {min(said['round'], said['rounds'])}: {DOING.get(said['doing'], said['doing'])}{who}"
    return f"{done}; {where}, {said['answered']} of {said['cohort']} clients answered{loss}"


def _times(at: RunStatus, now: float) -> str:
    until = at.progress["at"] if at.is_over else now
    left = estimate_remaining(at, now)
    return f"{format_duration(until - at.progress['began'])} so far" + (
        "" if left is None else f", about {format_duration(left)} left"
    )


def _curves(rows: Sequence[Mapping[str, float]], metric: str, width: int) -> Iterator[str]:
    for title, name in (
        ("loss", "train/loss"),
        (f"own {metric}", "clients/mean"),
        (f"global {metric}", f"global/{metric}"),
    ):
        values = [row[name] for row in rows if name in row]
        if len(values) > 1:
            yield f"{title:<16.16} {draw_sparkline(values[-max(4, width - 34) :])} {values[-1]:.4f}"


def draw_sparkline(values: Sequence[float]) -> str:
    """A line of blocks, the least value lowest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _table(rows: Sequence[Mapping[str, float]], metric: str, width: int) -> Table:
    table, left = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0)), width
    cells: list[list[str]] = [[] for _ in rows]
    for title, cell in list_columns(metric):
        found = [cell(row) for row in rows]
        wide = max(len(text) for text in (title, *found)) + 2
        if all(text == "–" for text in found) or wide > left + 2:
            continue
        left -= wide
        table.add_column(display_safe(title), justify="right", no_wrap=True)
        for own, text in zip(cells, found):
            own.append(text)
    for own in cells:
        table.add_row(*own)
    return table


def format_round(record: Mapping[str, Any], rounds: int, metric: str) -> str:
    """A finished round as a line of a log."""
    found = {"round": record["round"], **round_figures(record)}
    told = [f"{display_safe(title)} {text}" for title, cell in list_columns(metric)[1:] if (text := cell(found)) != "–"]
    missing = name_faults(record)
    return f"round {record['round']} of {rounds}: " + ", ".join(told) + (f"; {missing}" if missing else "")


def watch_screen(following: ProgressReader, console: Console, every: float) -> RunStatus:
    """Draws until the run is over, and leaves the last picture standing."""
    name, wide = str(following.folder), console.encoding.startswith("utf")

    def drawn(at: RunStatus) -> RenderableType:
        return draw_status(at, name, console.width, console.height, time.time(), wide)

    at = following.read()
    screen = Live(drawn(at), console=console, auto_refresh=False, screen=True)
    try:  # not `with`: a Ctrl-C in the first drawing, inside __enter__, would leave the terminal without its cursor
        screen.start(refresh=True)
        while not at.is_over:
            time.sleep(every)
            at = following.read()
            screen.update(drawn(at), refresh=True)
    finally:
        screen.stop()
    console.print(drawn(at))
    return at


def watch_lines(following: ProgressReader, say: Callable[[str], None], every: float) -> RunStatus:
    """A line for each finished round and for whatever was said, until the run is over."""
    told, heard, state = 0, list[str](), ""
    while True:
        at = following.read()
        if at.state != state and at.state in (WAITING, LOADING):
            say(f"{display_safe(str(following.folder))}: {at.state}")
        state = at.state
        metric, rounds = str(at.progress.get("metric", "accuracy")), at.progress.get("rounds", len(at.records))
        for text in at.progress.get("said", []):
            if text not in heard:
                heard.append(text)
                say(display_safe(text))
        for record in at.records[min(told, len(at.records)) :]:
            say(format_round(record, rounds, metric))
        told = len(at.records)
        if at.is_over:
            for text in describe_attendance(at):
                say(text)
            say(describe_state(at) if at.progress else at.state)
            return at
        time.sleep(every)
