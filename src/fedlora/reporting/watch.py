"""The display of a run under way: a screen that is redrawn, or lines where the output is no terminal."""

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

from fedlora.runs.attendance import count_scored_clients, describe_means, name_faults
from fedlora.runs.progress_file import LOADING, RUNNING, WAITING, ProgressReader, RunStatus
from fedlora.runs.record import round_figures
from fedlora.text import display_safe

LATELY = 5  # last rounds, from which the remaining time is estimated
BARS = "▁▂▃▄▅▆▇█"
DOING = {
    "starting": "starting", "step": "training", "turn": "training", "evaluation": "scored", "round": "scored",
    "waiting": "waiting", "absent": "training", "quarantined": "training", "node": "training",
}  # fmt: skip
Cell = Callable[[Mapping[str, float]], str]


def _format_figure(name: str, form: str = "{:.4f}", scale: float = 1.0) -> Cell:
    return lambda row: form.format(row[name] / scale) if name in row else "–"


def list_columns(metric: str) -> list[tuple[str, Cell]]:
    """List titles and cells of a round's row, the most important first; a narrow terminal shows as many as fit."""
    return [
        ("round", _format_figure("round", "{:.0f}")),
        (f"own {metric}", _format_figure("clients/mean")),
        ("loss", _format_figure("train/loss")),
        (f"global {metric}", _format_figure(f"global/{metric}")),
        ("worst", _format_figure("clients/worst")),
        ("error", _format_figure("aggregation/served", "{:.1e}")),
        ("MB up", _format_figure("bytes_up/total", "{:.2f}", 1e6)),
        ("MB down", _format_figure("bytes_down/total", "{:.2f}", 1e6)),
        ("clients", _format_figure("train/clients", "{:.0f}")),
        ("left out", lambda row: str(sum(int(row.get(f"faults/{k}", 0)) for k in ("absent", "quarantined")) or "–")),
        ("quarantined", _format_figure("faults/quarantined", "{:.0f}")),
        ("not scored", _format_figure("faults/unscored", "{:.0f}")),
        ("ε", _format_figure("privacy/epsilon", "{:.2f}")),
        ("seconds", _format_figure("seconds/total", "{:.1f}")),
    ]


def estimate_remaining(status: RunStatus, now: float) -> float | None:
    """Estimate the seconds until the end from the last rounds; None before the first round."""
    times = [s for record in status.records[-LATELY:] if (s := record.get("seconds", {}).get("total"))]
    if not times or status.state != RUNNING:
        return None
    left = status.progress["rounds"] - len(status.records)
    return max(0.0, fmean(times) * left - max(0.0, now - status.progress["at"]))


def format_duration(seconds: float) -> str:
    """Format a duration in a few characters."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{timedelta(minutes=round(seconds / 60))!s}"[:-3] + " h"


def draw_status(
    status: RunStatus, name: str, width: int, height: int, now: float, unicode: bool = True
) -> RenderableType:
    """Draw a run's status for a terminal of ``width`` columns and ``height`` lines."""
    metric = str(status.progress.get("metric", "accuracy"))
    texts = list(_describe_status(status, name, now))
    head: list[RenderableType] = [Text(text, overflow="fold") for text in texts]
    if status.progress:
        grid = Table.grid()  # since a bar alone does not end its line
        grid.add_row(ProgressBar(status.progress["rounds"], len(status.records), width=min(width, 60)))
        head.insert(1, grid)
    rows = [{"round": record["round"], **round_figures(record)} for record in status.records]
    curves = [_line(text) for text in _draw_curves(rows, metric, width)] if unicode else []
    notes = [_line(display_safe(text)) for text in status.progress.get("said", [])[-4:]]
    folded = sum(len(text) // width for text in texts)
    room = height - len(head) - 2 * folded - len(curves) - len(notes) - 3
    table = [_build_table(rows[-max(1, room) :], metric, width)] if rows else []
    return Group(*head, *curves, *table, *notes)


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _describe_status(status: RunStatus, name: str, now: float) -> Iterator[str]:
    yield ", ".join(map(display_safe, [name, *([status.progress["title"]] if "title" in status.progress else [])]))
    if status.state == WAITING:
        yield "waiting for the run to begin; Ctrl-C leaves"
    if status.state == LOADING:
        yield "the model and the data are being loaded"
    if status.progress:
        yield describe_state(status)
        yield from describe_attendance(status)
        left = estimate_remaining(status, now)
        until = status.progress["at"] if status.is_over else now
        rest = "" if left is None else f", about {format_duration(left)} left"
        yield f"{format_duration(until - status.progress['began'])} so far{rest}"


def describe_attendance(status: RunStatus) -> Iterator[str]:
    """Describe the clients that are missing now, and the clients behind the means; nothing if none is missing."""
    missing, total = status.progress.get("missing") or {}, status.progress.get("clients", 0)
    if count := missing.get("count"):
        first = [display_safe(text) for text in missing["first"]]
        more = f"; and {count - len(first)} more clients" if count > len(first) else ""
        yield f"left out {'at its end' if status.is_over else 'now'}: {'; '.join(first)}{more}"
    if text := describe_means([(r["round"], count_scored_clients(r)) for r in status.records if "clients" in r], total):
        yield f"clients' own models: {text}"


def describe_state(status: RunStatus) -> str:
    """Describe the state of a run in a line."""
    progress, done = status.progress, f"{len(status.records)} of {status.progress['rounds']} rounds"
    if status.is_over:
        why = f": {display_safe(progress['error'])}" if progress.get("error") else ""
        return f"{status.state} after {done}{why}"
    who = "" if progress.get("client") is None else f", client {progress['client']}"
    loss = "" if progress.get("loss") is None else f", loss {progress['loss']:.4f}"
    doing = DOING.get(progress["doing"], progress["doing"])
    where = f"round {min(progress['round'], progress['rounds'])}: {doing}{who}"
    return f"{done}; {where}, {progress['answered']} of {progress['cohort']} clients answered{loss}"


def _draw_curves(rows: Sequence[Mapping[str, float]], metric: str, width: int) -> Iterator[str]:
    curves = {"loss": "train/loss", f"own {metric}": "clients/mean", f"global {metric}": f"global/{metric}"}
    for title, name in curves.items():
        values = [row[name] for row in rows if name in row]
        if len(values) > 1:
            yield f"{title:<16.16} {draw_sparkline(values[-max(4, width - 34) :])} {values[-1]:.4f}"


def draw_sparkline(values: Sequence[float]) -> str:
    """Draw values as a line of blocks, the least value lowest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _build_table(rows: Sequence[Mapping[str, float]], metric: str, width: int) -> Table:
    table, left = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0)), width
    columns = []
    for title, cell in list_columns(metric):
        texts = [cell(row) for row in rows]
        size = max(len(text) for text in (title, *texts)) + 2
        if any(text != "–" for text in texts) and size <= left + 2:
            left -= size
            table.add_column(display_safe(title), justify="right", no_wrap=True)
            columns.append(texts)
    for line in zip(*columns):
        table.add_row(*line)
    return table


def format_round(record: Mapping[str, Any], rounds: int, metric: str) -> str:
    """Format a finished round as a line of a log."""
    row = {"round": record["round"], **round_figures(record)}
    texts = [f"{display_safe(title)} {text}" for title, cell in list_columns(metric)[1:] if (text := cell(row)) != "–"]
    missing = name_faults(record)
    return f"round {record['round']} of {rounds}: " + ", ".join(texts) + (f"; {missing}" if missing else "")


def watch_screen(reader: ProgressReader, console: Console, every: float) -> RunStatus:
    """Redraw the status until the run is over; the last picture stays on the terminal."""
    name, unicode = str(reader.folder), console.encoding.startswith("utf")

    def draw(status: RunStatus) -> RenderableType:
        return draw_status(status, name, console.width, console.height, time.time(), unicode)

    status = reader.read()
    screen = Live(draw(status), console=console, auto_refresh=False, screen=True)
    try:  # not `with`: Ctrl-C during the first drawing, in __enter__, would leave the terminal without its cursor
        screen.start(refresh=True)
        while not status.is_over:
            time.sleep(every)
            status = reader.read()
            screen.update(draw(status), refresh=True)
    finally:
        screen.stop()
    console.print(draw(status))
    return status


def watch_lines(reader: ProgressReader, say: Callable[[str], None], every: float) -> RunStatus:
    """Print a line for each finished round and each note, until the run is over."""
    count, notes, state = 0, set[str](), ""
    while True:
        status = reader.read()
        if status.state != state and status.state in (WAITING, LOADING):
            say(f"{display_safe(str(reader.folder))}: {status.state}")
        state = status.state
        metric = str(status.progress.get("metric", "accuracy"))
        rounds = status.progress.get("rounds", len(status.records))
        for text in status.progress.get("said", []):
            if text not in notes:
                notes.add(text)
                say(display_safe(text))
        for record in status.records[min(count, len(status.records)) :]:
            say(format_round(record, rounds, metric))
        count = len(status.records)
        if status.is_over:
            for text in describe_attendance(status):
                say(text)
            say(describe_state(status) if status.progress else status.state)
            return status
        time.sleep(every)
