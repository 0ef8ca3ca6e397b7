"""Each method's curve on the demo as SVG, from docs/results/demo-curves.jsonl (``python -m benchmarks.curves``)."""

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # method -> its runs, one a seed
BESIDE = ("fedit", "local")  # drawn faintly, to compare with
PANELS = {"global": "the shared model, global test rows", "clients": "clients' own models, own test rows, mean"}
WIDTH, HEIGHT, LEFT, TOP, GAP, BOTTOM = 720, 300, 48, 52, 40, 44
LOW = 0.6  # where the axis begins; scores below are drawn at its foot
STYLE = """
  .page { fill: #ffffff } .text { fill: #333b45 } .faint { fill: #69727d } .grid { stroke: #e3e6ea }
  .own { stroke: #3b5bdb; fill: none; stroke-width: 2.6 } .band { fill: #3b5bdb; opacity: .16 } .dot { fill: #3b5bdb }
  .fedit { stroke: #8a6d3b; fill: none; stroke-width: 1.6; stroke-dasharray: 6 3 }
  .local { stroke: #69727d; fill: none; stroke-width: 1.6; stroke-dasharray: 2 3 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #1e2129 } .text { fill: #dfe3ea } .faint { fill: #a3abb8 } .grid { stroke: #363b47 }
    .own { stroke: #91a7ff } .band { fill: #91a7ff } .dot { fill: #91a7ff }
    .fedit { stroke: #d9b26a } .local { stroke: #a3abb8 }
  }"""


def read(docs: Path) -> Curves:
    """What was measured, by method; a run that diverged has no rounds and is left out."""
    book = docs / "results" / "demo-curves.jsonl"
    rows = [json.loads(line) for line in book.read_text(encoding="utf-8").splitlines()] if book.exists() else []
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in (row for row in rows if row["rounds"]):
        found.setdefault(row["method"], []).append(row)
    return found


def figures(found: Curves) -> dict[str, str]:
    """File name -> SVG, for every method that was measured."""
    return {f"{name}.svg": figure(name, found) for name in found}


def series(runs: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float, float, float]]:
    """Round, mean, least and greatest over seeds; empty where the method has no such model."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for point in run["rounds"]:
            if key in point:
                found.setdefault(point["round"], []).append(point[key])
    return [(round, statistics.fmean(v), min(v), max(v)) for round, v in sorted(found.items())]


def figure(name: str, found: Curves) -> str:
    """One method: a panel a kind of model, its curve with the range over seeds, FedIT's and local training's too."""
    rounds = max(point["round"] for run in found[name] for point in run["rounds"])
    wide = (WIDTH - LEFT - GAP - 16) / 2
    lines = []
    for number, (key, title) in enumerate(PANELS.items()):
        x = LEFT + number * (wide + GAP)
        lines += _frame(x, wide, title, rounds)
        lines += _panel(x, wide, rounds, key, name, found)
    what = f"Accuracy of {name} on the demo, round by round"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
            f' aria-label="{escape(what)}" font-family="system-ui, sans-serif" font-size="12">',
            f"<title>{escape(what)}</title><style>{STYLE}\n</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
            *_legend(name),
            *lines,
            "</svg>",
            "",
        ]
    )


def _legend(name: str) -> list[str]:
    shown, x = [(name, "own"), *((other, other) for other in BESIDE if other != name)], float(LEFT)
    lines = []
    for label, style in shown:
        lines.append(f'<path class="{style}" d="M{x:.1f} 18h26"/>')
        lines.append(f'<text class="text" x="{x + 32:.1f}" y="22">{escape(label)}</text>')
        x += 54 + 7.2 * len(label)
    return lines


def _frame(x: float, wide: float, title: str, rounds: int) -> list[str]:
    lines = [f'<text class="text" x="{x:.1f}" y="{TOP - 10}">{escape(title)}</text>']
    for level in (0.6, 0.7, 0.8, 0.9, 1.0):
        y = _y(level)
        lines.append(f'<path class="grid" d="M{x:.1f} {y:.1f}h{wide:.1f}"/>')
        lines.append(f'<text class="faint" x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{level:.1f}</text>')
    for round in sorted({1, (rounds + 1) // 2, rounds}):
        at = _x(x, wide, round, rounds)
        lines.append(f'<text class="faint" x="{at:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{round}</text>')
    middle = x + wide / 2
    return [*lines, f'<text class="faint" x="{middle:.1f}" y="{HEIGHT - 9}" text-anchor="middle">round</text>']


def _panel(x: float, wide: float, rounds: int, key: str, name: str, found: Curves) -> list[str]:
    lines = []
    for other in BESIDE:
        points = series(found.get(other, ()), key) if other != name else []
        if points:
            lines.append(
                f'<path class="{other}" d="{_path([(_x(x, wide, r, rounds), _y(m)) for r, m, *_ in points])}"/>'
            )
    own = series(found[name], key)
    if not own:
        say = f'<text class="faint" x="{x + wide / 2:.1f}" y="{_y(0.7):.1f}" text-anchor="middle">'
        return [*lines, f"{say}{escape(name)} has no such model</text>"]
    if any(low < high for _, _, low, high in own):
        low = [(_x(x, wide, r, rounds), _y(v)) for r, _, v, _ in own]
        high = [(_x(x, wide, r, rounds), _y(v)) for r, _, _, v in reversed(own)]
        lines.append(f'<path class="band" d="{_path(low + high)}Z"/>')
    lines.append(f'<path class="own" d="{_path([(_x(x, wide, r, rounds), _y(m)) for r, m, *_ in own])}"/>')
    last = own[-1]
    at, y = _x(x, wide, last[0], rounds), _y(last[1])
    lines.append(f'<circle class="dot" cx="{at:.1f}" cy="{y:.1f}" r="3.2"/>')
    return [*lines, f'<text class="text" x="{at:.1f}" y="{y + 20:.1f}" text-anchor="end">{last[1]:.3f}</text>']


def _x(x: float, wide: float, round: int, rounds: int) -> float:
    return x + wide * (round - 1) / max(1, rounds - 1)


def _y(value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (max(LOW, value) - LOW) / (1 - LOW))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
