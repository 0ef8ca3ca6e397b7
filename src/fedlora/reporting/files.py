"""Figures and tables as files for a paper: SVG, PDF and PNG at a column's width; CSV, Markdown and LaTeX."""

import csv
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fedlora.files import write
from fedlora.reporting.charts import MM, paper_config, with_rows
from fedlora.reporting.figures import Figure, figures
from fedlora.reporting.load import Run
from fedlora.reporting.tables import by_round as by_round
from fedlora.reporting.tables import comparison as standing
from fedlora.reporting.tables import totals
from fedlora.runs.table import Table
from fedlora.text import display_safe

WIDTH = 84.0  # millimetres: one of two columns
PPI = 300  # pixels to the inch of a PNG
ORDERS = "=+-@\t\r"  # a text that begins so is a formula to a spreadsheet
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "ε": r"$\varepsilon$", "δ": r"$\delta$", "–": "--",
    "−": "$-$", "‖": r"$\Vert$", "√": r"$\surd$", "Σ": r"$\Sigma$", "²": r"$^2$",
}  # fmt: skip


def tables(runs: Sequence[Run]) -> list[Table]:
    """All tables of these runs that have a row."""
    make = (standing.methods, standing.tests, standing.one_by_one, by_round.curves, totals.clients, by_round.errors,
            by_round.oracle, by_round.layers, by_round.drift, by_round.cosine_similarity, totals.labels, totals.sent,
            totals.phases, totals.faults, by_round.epsilon)  # fmt: skip
    return [table for one in make if (table := one(runs)).rows]


def files(runs: Sequence[Run], out: Path, width: float = WIDTH) -> tuple[list[Path], list[Figure]]:
    """Writes ``FIGURE.svg``, ``.pdf``, ``.png`` and ``TABLE.csv``, ``.md``, ``.tex`` into ``out``.

    ``width`` is that of a figure, in millimetres. Returns the files, and the figures that there is nothing to draw of.
    """
    if not 20 <= width <= 600:
        raise ValueError(f"--width is {width:g}; it is a figure's width in millimetres, from 20 to 600.")
    drawn = figures(runs)
    found = [path for figure in drawn if figure.chart is not None for path in _figure(figure, out, width)]
    for table in tables(runs):
        for kind, make in {"csv": as_csv, "md": as_markdown, "tex": as_latex}.items():
            found.append(out / f"{table.name}.{kind}")
            write(found[-1], make(table).encode())
    return found, [figure for figure in drawn if figure.chart is None]


def _figure(figure: Figure, out: Path, width: float) -> list[Path]:
    """One figure as SVG, PDF and PNG."""
    import vl_convert

    assert figure.chart is not None, "what is not drawn has no file"
    points = width * MM
    fits = {"width": points, "autosize": {"type": "fit-x", "contains": "padding"}, "padding": 2}
    tall = {} if "height" in figure.chart.to_dict(validate=False) else {"height": round(points * 0.62)}
    remark = {"title": _remark(figure.remark, points)} if figure.remark else {}
    spec = with_rows(figure.chart, figure.table.rows, **fits, **tall, **remark, config=paper_config())
    svg = vl_convert.vegalite_to_svg(spec)
    # One unit is a point (1/72 inch): the PDF's own, while an SVG's and a PNG's would be pixels.
    written = {
        "svg": in_points(svg).encode(), "pdf": vl_convert.svg_to_pdf(svg),
        "png": vl_convert.svg_to_png(svg, ppi=PPI),
    }  # fmt: skip
    for kind, content in written.items():
        write(out / f"{figure.name}.{kind}", content)
    return [out / f"{figure.name}.{kind}" for kind in written]


def _remark(text: str, points: float) -> dict[str, object]:
    """What a figure says above its axes, in lines that fit its width: a file is shown without its caption."""
    return {"text": textwrap.wrap(text, max(20, int(points / 4))), "anchor": "start", "fontSize": 7, "fontWeight": 400}


def in_points(svg: str) -> str:
    """The picture with its size in points, so that it is as wide in a document as on paper."""
    head, rest = svg.split(">", 1)
    words = [f'{word[:-1]}pt"' if word.startswith(("width=", "height=")) else word for word in head.split(" ")]
    return f"{' '.join(words)}>{rest}"


def as_csv(table: Table) -> str:
    """All digits; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([column.title for column in _wide(table)])
    for row in table.rows:
        lines.writerow([_plain(row.get(column.key)) for column in _wide(table)])
    return file.getvalue()


def _wide(table: Table) -> list:
    """The columns with their standard deviations beside them."""
    found = []
    for column in table.columns:
        found.append(column)
        if column.spread is not None:
            found.append(type(column)(column.spread, f"{column.title}, standard deviation", column.digits))
    return found


def _plain(value: object) -> object:
    if not isinstance(value, str):
        return "" if value is None else value
    return f"'{value}" if value[:1] and value[0] in ORDERS else value


def as_markdown(table: Table) -> str:
    """A table of pipes."""
    heads = [_marked(column.title) for column in table.columns]
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + "|".join("---" if column.digits is None else "---:" for column in table.columns) + "|")
    for row in table.rows:
        lines.append("| " + " | ".join(_marked(table.text(row, column)) for column in table.columns) + " |")
    return "\n".join([*lines, "", _marked(table.note), ""]) if table.note else "\n".join([*lines, ""])


def _marked(text: str) -> str:
    """Text without a meaning to Markdown or HTML."""
    safe = display_safe(text, len(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#!" else c for c in safe)


def as_latex(table: Table) -> str:
    """A ``tabular`` with booktabs' rules; long tables are a ``longtable``'s work, and CSV has them whole."""
    kinds = "".join("l" if column.digits is None else "r" for column in table.columns)
    rows = [[table.text(row, column) for column in table.columns] for row in table.rows]
    lines = [" & ".join(map(latex, cells)) + r" \\" for cells in rows]
    head = " & ".join(latex(column.title) for column in table.columns) + r" \\"
    note = [f"% {line}" for line in [latex(table.note)] if table.note]
    body = [r"\begin{tabular}{" + kinds + "}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([r"% \usepackage{booktabs}", *note, *body, ""])


def latex(text: str) -> str:
    """Text without a meaning to LaTeX."""
    return "".join(LATEX.get(c, c) for c in display_safe(text, len(text)))
