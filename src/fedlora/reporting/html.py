"""One HTML file that holds all that it needs; nothing in it asks anybody for anything.

Every name is escaped where it becomes markup, and ``<`` where it lies in a script's data. A policy in the page forbids
requests and every script but its own, whatever else may get in.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fedlora.reporting import words
from fedlora.reporting.charts import page_config, with_rows
from fedlora.reporting.figures import Figure, figures
from fedlora.reporting.load import Run
from fedlora.reporting.tables import comparison as standing
from fedlora.reporting.tables import totals
from fedlora.runs.table import Table, from_pairs, group_by, to_html
from fedlora.schema import dumps, strip_folders
from fedlora.text import display_safe

ROWS = 500  # of a table in the page
CONFIGS = 12  # configurations that are written out; the others lie in their folders
TITLES = {  # the first figure of each section
    "global-by-round": "Over time", "clients": "Clients", "errors": "Aggregation", "drift": "Drift and similarity",
    "labels": "Data", "bytes": "Cost and faults",
}  # fmt: skip


def page(runs: Sequence[Run]) -> str:
    """The report of these runs, several of them compared."""
    title = f"{_named(runs)}: fedlora report"
    scripts = [_bundle(), files(__package__).joinpath("page.js").read_text(encoding="utf-8")]
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    drawn = figures(runs)
    return "\n".join(
        [
            "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">', _policy(scripts),
            '<meta name="viewport" content="width=device-width, initial-scale=1">', '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>", f"<style>\n{style}</style>", "</head>", "<body>",
            '<a class="skip" href="#main">Skip to the report</a>',
            f"<header><h1>{escape(_named(runs))}</h1>", _contents(), "</header>", '<main id="main" tabindex="-1">',
            f'<p id="opening">{escape(words.opening(runs))}</p>', *_standing(runs), *_sections(drawn),
            *_faults(runs), *_again(runs), "</main>",
            f"<footer>Made by fedlora {escape(version('fedlora'))}. This file holds all that it shows and asks nobody "
            "for anything.</footer>",
            *(f"<script>{script}</script>" for script in scripts), "</body>", "</html>", "",
        ]
    )  # fmt: skip


def _named(runs: Sequence[Run]) -> str:
    labels = list(group_by(runs, lambda run: run.label))
    if len(runs) == 1:
        return f"{runs[0].name} ({labels[0]})"
    return f"{len(runs)} runs of {len(labels)} methods" if len(labels) > 1 else f"{len(runs)} runs of {labels[0]}"


def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as vl-convert has them."""
    import vl_convert

    return str(vl_convert.javascript_bundle()).replace("</script", "<\\/script")


def _policy(scripts: Sequence[str]) -> str:
    """Only these scripts, by their digests, and no request at all. Vega compiles its expressions, which is an eval."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    known = " ".join(f"'sha256-{found}'" for found in hashes)
    rules = f"default-src 'none'; script-src {known} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
    return f"<meta http-equiv=\"Content-Security-Policy\" content=\"{rules}; base-uri 'none'; form-action 'none'\">"


def _contents() -> str:
    ids = {"standing": "Results", **TITLES, "again": "Repeat it"}
    items = "".join(f'<li><a href="#s-{key}">{escape(title)}</a></li>' for key, title in ids.items())
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _standing(runs: Sequence[Run]) -> list[str]:
    found = ['<h2 id="s-standing">Results</h2>']
    if len(runs) > 1:
        found.append(table_html(standing.methods(runs), is_sortable=True))
        tests = standing.tests(runs)
        few = "There is no paired test: it needs two methods that were run with two seeds in common (--seeds 0,1,2)."
        found.append(table_html(tests, is_sortable=True) if tests.rows else f'<p class="note">{escape(few)}</p>')
    found.append(table_html(standing.one_by_one(runs), is_sortable=len(runs) > 1))
    return found


def _sections(drawn: Sequence[Figure]) -> list[str]:
    """Figures under their headings; what there is nothing to draw of is a list of sentences."""
    found: list[str] = []
    open_ = False
    absent: list[str] = []
    for figure in [*drawn, None]:
        if figure is None or figure.name in TITLES:
            found += ["</div>"] if open_ else []
            found += ['<ul class="absent note">', *absent, "</ul>"] if absent else []
            absent = []
        if figure is None:
            break
        if figure.name in TITLES:
            title = TITLES[figure.name]
            found += [f'<h2 id="s-{figure.name}">{escape(title)}</h2>', '<div class="figures">']
            open_ = True
        if figure.chart is None:
            absent.append(f"<li>{escape(figure.title)}: {escape(figure.caption)}</li>")
        else:
            found.append(figure_html(figure))
    return found


def figure_html(figure: Figure) -> str:
    """One figure with its caption, its text for those who do not see it, and its rows."""
    name, title = f"f-{escape(figure.name, quote=True)}", escape(figure.title, quote=True)
    return "".join([
        f'<figure id="{name}" data-figure="{escape(figure.mark)}" aria-labelledby="{name}-title">',
        f'<h3 id="{name}-title">{title}</h3>',
        f'<div class="chart" role="img" aria-label="{escape(figure.alt, quote=True)}"></div>',
        f"<figcaption>{escape(figure.caption)}</figcaption>",
        f'<details><summary>As a table<span class="unseen">: {title}</span></summary>',
        f'<div class="rows scroll tall" role="region" tabindex="0" aria-label="{title}, rows"></div></details>',
        f'<script type="application/json" id="{name}-data">{script_json(_about(figure))}</script></figure>',
    ])  # fmt: skip


def _about(figure: Figure) -> dict[str, Any]:
    """What the script needs: the chart, and the columns of its rows. The rows are in it once."""
    assert figure.chart is not None, "what is not drawn has no figure"
    fits = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    spec = with_rows(figure.chart, figure.table.rows, **fits, config=page_config())
    keys = {key for row in figure.table.rows for key in row}
    columns = [{"key": c.key, "title": c.title, "digits": c.digits} for c in figure.table.columns if c.key in keys]
    return {"title": figure.title, "columns": columns, "spec": spec}


def script_json(value: Any) -> str:
    """JSON that cannot end the script it lies in, nor hold what is no JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def table_html(table: Table, is_sortable: bool = False) -> str:
    """A table with its heading and note, in a region that scrolls."""
    left = f" The first {ROWS} of {len(table.rows)} rows; fedlora plots writes all." if len(table.rows) > ROWS else ""
    title, name = escape(table.title, quote=True), f"t-{table.name}"
    tall = " tall" if len(table.rows) > 20 else ""
    attributes = f'id="{name}" aria-labelledby="{name}-title" aria-describedby="{name}-note"'
    return "".join([
        f'<h3 id="{name}-title">{title}</h3><p class="note" id="{name}-note">{escape(table.note + left)}</p>',
        f'<div class="scroll{tall}" role="region" tabindex="0" aria-label="{title}, table">',
        to_html(table, attributes, is_sortable, ROWS), "</div>",
    ])  # fmt: skip


def _faults(runs: Sequence[Run]) -> list[str]:
    table = totals.faults(runs)
    return [table_html(table, is_sortable=True)] if table.rows else []


def _again(runs: Sequence[Run]) -> list[str]:
    """How to repeat it: commands, configurations, versions, hardware."""
    lines = "\n".join(words.commands(runs[:ROWS]))
    found = ['<h2 id="s-again">Repeat it</h2>', "<p>The same configuration and seed give the same bits.</p>"]
    found.append(f'<pre tabindex="0" role="region" aria-label="Commands">{escape(lines)}</pre>')
    found += [_configuration(run, len(runs) == 1) for run in runs[:CONFIGS]]
    if len(runs) > CONFIGS:
        more = f"{len(runs) - CONFIGS} more configurations lie in their folders as config.toml."
        found.append(f'<p class="note">{more}</p>')
    return found


def _configuration(run: Run, unfolded: bool) -> str:
    name = f"{run.label}, seed {run.seed} ({run.name})"
    title = escape(name, quote=True)
    text = "\n".join(display_safe(line, 2000) for line in dumps(strip_folders(run.table)).splitlines())
    return "".join([
        f"<details{' open' if unfolded else ''}><summary>Configuration, versions and hardware: {title}</summary>",
        f'<div class="scroll">{to_html(from_pairs(name, words.hardware(run)))}</div>',
        f'<pre tabindex="0" role="region" aria-label="Configuration of {title}">',
        f"{escape(text)}</pre></details>",
    ])  # fmt: skip
