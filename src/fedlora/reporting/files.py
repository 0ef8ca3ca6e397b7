"""Figures and tables as files for a paper: SVG, PDF and PNG at a column's width; CSV, Markdown and LaTeX."""

import csv
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.files import write
from fedlora.reporting.charts import MM, PAPER, to_vega
from fedlora.reporting.figures import Figure, draw_figures
from fedlora.reporting.load import Run
from fedlora.reporting.tables import by_round, comparison, totals
from fedlora.runs.table import Table
from fedlora.text import display_safe

WIDTH = 84.0  # millimetres: one of two columns
PPI = 300  # pixels to the inch of a PNG
ORDERS = "=+-@\t\r"  # a spreadsheet takes a text with such a first character for a formula
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "ε": r"$\varepsilon$", "δ": r"$\delta$", "–": "--",
    "−": "$-$", "‖": r"$\Vert$", "√": r"$\surd$", "Σ": r"$\Sigma$", "²": r"$^2$",
}  # fmt: skip


TABLES = (
    comparison.tabulate_by_method, comparison.tabulate_tests, comparison.tabulate_runs, by_round.tabulate_curves,
    totals.tabulate_clients, by_round.tabulate_errors, by_round.tabulate_oracle_by_round, by_round.tabulate_layers,
    by_round.tabulate_drift, by_round.tabulate_cosines, totals.tabulate_labels, totals.tabulate_bytes,
    totals.tabulate_phases, totals.tabulate_faults, by_round.tabulate_epsilon,
)  # fmt: skip


def write_files(runs: Sequence[Run], out: Path, width: float = WIDTH) -> tuple[list[Path], list[Figure]]:
    """Write ``FIGURE.svg``, ``.pdf``, ``.png`` and ``TABLE.csv``, ``.md``, ``.tex`` into ``out``.

    ``width`` is a figure's, in millimetres. Returns the paths of the files, and the figures that have no data.
    """
    if not 20 <= width <= 600:
        raise ValueError(f"--width is {width:g}; it is a figure's width in millimetres, from 20 to 600.")
    figures = draw_figures(runs)
    paths = [path for figure in figures if figure.chart is not None for path in _write_figure(figure, out, width)]
    for table in (table for tabulate in TABLES if (table := tabulate(runs)).rows):
        for kind, format_table in {"csv": format_csv, "md": format_markdown, "tex": format_latex}.items():
            paths.append(out / f"{table.name}.{kind}")
            write(paths[-1], format_table(table).encode())
    return paths, [figure for figure in figures if figure.chart is None]


def _write_figure(figure: Figure, out: Path, width: float) -> list[Path]:
    """Write one figure as SVG, PDF and PNG."""
    import vl_convert

    assert figure.chart is not None, "a figure without a chart has no file"
    points = width * MM
    fits = {"width": points, "autosize": {"type": "fit-x", "contains": "padding"}, "padding": 2}
    tall = {} if "height" in figure.chart.to_dict(validate=False) else {"height": round(points * 0.62)}
    title: dict[str, Any] = {}
    if figure.remark:  # above the axes, in lines that fit the width, since a file has no caption
        lines = textwrap.wrap(figure.remark, max(20, int(points / 4)))
        title = {"title": {"text": lines, "anchor": "start", "fontSize": 7, "fontWeight": 400}}
    spec = to_vega(figure.chart, figure.table.rows, **fits, **tall, **title, config=PAPER)
    svg = vl_convert.vegalite_to_svg(spec)
    # One unit is a point (1/72 inch), the unit of PDF; SVG and PNG count in pixels. With its size in points, an SVG is
    # as wide in a document as on paper.
    head, rest = svg.split(">", 1)
    words = [f'{word[:-1]}pt"' if word.startswith(("width=", "height=")) else word for word in head.split(" ")]
    written = {
        "svg": f"{' '.join(words)}>{rest}".encode(), "pdf": vl_convert.svg_to_pdf(svg),
        "png": vl_convert.svg_to_png(svg, ppi=PPI),
    }  # fmt: skip
    for kind, content in written.items():
        write(out / f"{figure.name}.{kind}", content)
    return [out / f"{figure.name}.{kind}" for kind in written]


def format_csv(table: Table) -> str:
    """Format a table with all digits; a text that a spreadsheet would take for a formula gets an apostrophe."""
    columns = []
    for column in table.columns:
        columns.append((column.key, column.title))
        columns += [(column.spread, f"{column.title}, standard deviation")] if column.spread is not None else []
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([title for _, title in columns])
    for row in table.rows:
        cells = ["" if row.get(key) is None else row[key] for key, _ in columns]
        lines.writerow([f"'{x}" if isinstance(x, str) and x[:1] and x[0] in ORDERS else x for x in cells])
    return file.getvalue()


def format_markdown(table: Table) -> str:
    """Format a table with pipes."""
    rows = [[column.title for column in table.columns]]
    rows += [[column.text(row) for column in table.columns] for row in table.rows]
    lines = ["| " + " | ".join(map(_escape_markdown, cells)) + " |" for cells in rows]
    lines.insert(1, "|" + "|".join("---" if column.digits is None else "---:" for column in table.columns) + "|")
    note = ["", _escape_markdown(table.note)] if table.note else []
    return "\n".join([*lines, *note, ""])


def _escape_markdown(text: str) -> str:
    """Escape the characters with a meaning in Markdown or HTML."""
    safe = display_safe(text, len(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#!" else c for c in safe)


def format_latex(table: Table) -> str:
    """Format a ``tabular`` with booktabs' rules."""
    kinds = "".join("l" if column.digits is None else "r" for column in table.columns)
    rows = [[column.title for column in table.columns]]
    rows += [[column.text(row) for column in table.columns] for row in table.rows]
    head, *lines = [" & ".join(map(escape_latex, cells)) + r" \\" for cells in rows]
    note = [f"% {escape_latex(table.note)}"] if table.note else []
    body = [r"\begin{tabular}{" + kinds + "}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([r"% \usepackage{booktabs}", *note, *body, ""])


def escape_latex(text: str) -> str:
    """Escape the characters with a meaning in LaTeX."""
    return "".join(LATEX.get(c, c) for c in display_safe(text, len(text)))
