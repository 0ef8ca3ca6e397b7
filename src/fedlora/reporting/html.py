"""The report as one HTML file with all its parts, which makes no request.

Every name is escaped in markup, and ``<`` in a script's data. A policy in the page forbids requests and all scripts but
its own.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from statistics import fmean
from typing import Any

from fedlora.reporting.charts import PAGE, to_vega
from fedlora.reporting.figures import Figure, draw_figures
from fedlora.reporting.load import Run
from fedlora.reporting.tables import comparison, totals
from fedlora.reporting.tables.by_round import get_metric
from fedlora.reporting.tables.comparison import describe_coverage, group_figures, join_names, rank
from fedlora.runs.attendance import describe_scored_clients, fault_lines, is_complete
from fedlora.runs.file_names import CONFIG
from fedlora.runs.table import Table, from_pairs, group_by, to_html
from fedlora.schema import dumps, strip_folders
from fedlora.security.privacy import Privacy
from fedlora.text import display_safe

ROWS = 500  # of a table in the page
CONFIGS = 12  # configurations in the page; the others are in their folders
WORDS = 120  # characters of a name in a sentence
STATES = {"under way": "is not finished (under way, or broken off)", "interrupted": "was interrupted",
          "diverged": "diverged"}  # fmt: skip
TITLES = {  # the first figure of each section
    "global-by-round": "Over time", "clients": "Clients", "errors": "Aggregation", "drift": "Drift and similarity",
    "labels": "Data", "bytes": "Cost and faults",
}  # fmt: skip


def render_page(runs: Sequence[Run]) -> str:
    """Render the report on these runs; several runs are compared."""
    import vl_convert

    name = _name_runs(runs)
    ids = {"standing": "Results", **TITLES, "again": "Repeat it"}
    items = "".join(f'<li><a href="#s-{key}">{escape(title)}</a></li>' for key, title in ids.items())
    contents = f'<nav aria-label="Contents"><ul>{items}</ul></nav>'
    bundle = str(vl_convert.javascript_bundle()).replace("</script", "<\\/script")  # Vega, Vega-Lite and Vega-Embed
    scripts = [bundle, files(__package__).joinpath("page.js").read_text(encoding="utf-8")]
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    drawn, faults = draw_figures(runs), totals.tabulate_faults(runs)
    return "\n".join(
        [
            "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">', _policy(scripts),
            '<meta name="viewport" content="width=device-width, initial-scale=1">', '<link rel="icon" href="data:,">',
            f"<title>{escape(name)}: fedlora report</title>", f"<style>\n{style}</style>", "</head>", "<body>",
            '<a class="skip" href="#main">Skip to the report</a>',
            f"<header><h1>{escape(name)}</h1>", contents, "</header>", '<main id="main" tabindex="-1">',
            f'<p id="opening">{escape(summarise_runs(runs))}</p>', *_render_results(runs), *_render_sections(drawn),
            *([render_table(faults, is_sortable=True)] if faults.rows else []), *_render_repetition(runs), "</main>",
            f"<footer>Made by fedlora {escape(version('fedlora'))}. This file holds all that it shows and asks nobody "
            "for anything.</footer>",
            *(f"<script>{script}</script>" for script in scripts), "</body>", "</html>", "",
        ]
    )  # fmt: skip


def _name_runs(runs: Sequence[Run]) -> str:
    labels = list(group_by(runs, lambda run: run.label))
    if len(runs) == 1:
        return f"{runs[0].name} ({labels[0]})"
    return f"{len(runs)} runs of {len(labels)} methods" if len(labels) > 1 else f"{len(runs)} runs of {labels[0]}"


def _policy(scripts: Sequence[str]) -> str:
    """Build a policy that allows these scripts by their digests, eval (for Vega's expressions), and no request."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    known = " ".join(f"'sha256-{digest}'" for digest in hashes)
    rules = f"default-src 'none'; script-src {known} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
    return f"<meta http-equiv=\"Content-Security-Policy\" content=\"{rules}; base-uri 'none'; form-action 'none'\">"


def _render_results(runs: Sequence[Run]) -> list[str]:
    html = ['<h2 id="s-standing">Results</h2>']
    if len(runs) > 1:
        html.append(render_table(comparison.tabulate_by_method(runs), is_sortable=True))
        tests = comparison.tabulate_tests(runs)
        few = "There is no paired test: it needs two methods that were run with two seeds in common (--seeds 0,1,2)."
        html.append(render_table(tests, is_sortable=True) if tests.rows else f'<p class="note">{escape(few)}</p>')
    html.append(render_table(comparison.tabulate_runs(runs), is_sortable=len(runs) > 1))
    return html


def _render_sections(drawn: Sequence[Figure]) -> list[str]:
    """Render the figures under their headings, and a list of sentences about those without data."""
    html: list[str] = []
    starts = [i for i, figure in enumerate(drawn) if figure.name in TITLES]
    for start, end in zip(starts, [*starts[1:], len(drawn)]):
        section, name = drawn[start:end], drawn[start].name
        absent = [f"<li>{escape(f.title)}: {escape(f.caption)}</li>" for f in section if f.chart is None]
        html += [f'<h2 id="s-{name}">{escape(TITLES[name])}</h2>', '<div class="figures">']
        html += [*(render_figure(figure) for figure in section if figure.chart is not None), "</div>"]
        html += ['<ul class="absent note">', *absent, "</ul>"] if absent else []
    return html


def render_figure(figure: Figure) -> str:
    """Render one figure with its caption, its alternative text and its rows."""
    assert figure.chart is not None, "a figure without a chart is not rendered"
    fits = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    spec = to_vega(figure.chart, figure.table.rows, **fits, config=PAGE)
    keys = {key for row in figure.table.rows for key in row}
    columns = [{"key": c.key, "title": c.title, "digits": c.digits} for c in figure.table.columns if c.key in keys]
    data = {"title": figure.title, "columns": columns, "spec": spec}  # the rows are in it once
    name, title = f"f-{escape(figure.name, quote=True)}", escape(figure.title, quote=True)
    return "".join([
        f'<figure id="{name}" data-figure="{escape(figure.mark)}" aria-labelledby="{name}-title">',
        f'<h3 id="{name}-title">{title}</h3>',
        f'<div class="chart" role="img" aria-label="{escape(figure.alt, quote=True)}"></div>',
        f"<figcaption>{escape(figure.caption)}</figcaption>",
        f'<details><summary>As a table<span class="unseen">: {title}</span></summary>',
        f'<div class="rows scroll tall" role="region" tabindex="0" aria-label="{title}, rows"></div></details>',
        f'<script type="application/json" id="{name}-data">{dump_script_json(data)}</script></figure>',
    ])  # fmt: skip


def dump_script_json(value: Any) -> str:
    """Return JSON that cannot end the script around it; NaN and infinity are errors."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def render_table(table: Table, is_sortable: bool = False) -> str:
    """Render a table with its heading and note, in a region that scrolls."""
    left = f" The first {ROWS} of {len(table.rows)} rows; fedlora plots writes all." if len(table.rows) > ROWS else ""
    title, name = escape(table.title, quote=True), f"t-{table.name}"
    tall = " tall" if len(table.rows) > 20 else ""
    attributes = f'id="{name}" aria-labelledby="{name}-title" aria-describedby="{name}-note"'
    return "".join([
        f'<h3 id="{name}-title">{title}</h3><p class="note" id="{name}-note">{escape(table.note + left)}</p>',
        f'<div class="scroll{tall}" role="region" tabindex="0" aria-label="{title}, table">',
        to_html(table, attributes, is_sortable, ROWS), "</div>",
    ])  # fmt: skip


def _render_repetition(runs: Sequence[Run]) -> list[str]:
    """Render the means to repeat the runs: commands, configurations, versions, hardware."""
    lines = "\n".join(list_commands(runs[:ROWS]))
    html = ['<h2 id="s-again">Repeat it</h2>', "<p>The same configuration and seed give the same bits.</p>"]
    html.append(f'<pre tabindex="0" role="region" aria-label="Commands">{escape(lines)}</pre>')
    html += [_render_configuration(run, len(runs) == 1) for run in runs[:CONFIGS]]
    if len(runs) > CONFIGS:
        more = f"{len(runs) - CONFIGS} more configurations lie in their folders as config.toml."
        html.append(f'<p class="note">{more}</p>')
    return html


def _render_configuration(run: Run, is_open: bool) -> str:
    name = f"{run.label}, seed {run.seed} ({run.name})"
    title = escape(name, quote=True)
    text = "\n".join(display_safe(line, 2000) for line in dumps(strip_folders(run.table)).splitlines())
    return "".join([
        f"<details{' open' if is_open else ''}><summary>Configuration, versions and hardware: {title}</summary>",
        f'<div class="scroll">{to_html(from_pairs(name, describe_run(run)))}</div>',
        f'<pre tabindex="0" role="region" aria-label="Configuration of {title}">',
        f"{escape(text)}</pre></details>",
    ])  # fmt: skip


def summarise_runs(runs: Sequence[Run]) -> str:
    """Summarise the settings and the results of runs in a few sentences."""
    labels = list(group_by(runs, lambda run: run.label))
    tables = [run.table.get("adapter", {"name": "lora"}) for run in runs]  # of all runs: a method may have its own
    names = [_shorten(t.get("name", "lora")) + (f" (rank {t['rank']})" if t.get("rank") else "") for t in tables]
    about = _describe_setting(runs[0].table, join_names(list(dict.fromkeys(names))) + " ")
    if any(_describe_setting(run.table, "") != _describe_setting(runs[0].table, "") for run in runs):
        about = "The runs differ in model, data or clients; their configurations are below"
    seeds = sorted({run.seed for run in runs})
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({join_names([str(s) for s in seeds])})"
    many = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    texts = [_describe_results(runs)]
    few = [f"{who} in {run.name}" for run in runs if (who := describe_coverage(run)) != "all"]
    texts += [f"The clients' own figures are over {join_names(few)}."] if few else []
    states = group_by([run for run in runs if run.state != "finished"], lambda run: run.state)
    others = [f"{join_names([run.name for run in group])} {STATES[state]}" for state, group in states.items()]
    texts += [f"Of these, {'; '.join(others)}."] if others else []
    return f"{about}, combined by {join_names(labels)}: {many}, {seed}. {' '.join(texts)}"


def _describe_setting(table: Mapping[str, Any], adapters: str) -> str:
    clients, training, task = table.get("clients", {}), table.get("training", {}), table.get("task", {})
    count, size, epochs = clients.get("count", 10), clients.get("per_round"), training.get("local_epochs")
    cohort = f", {size} of them a round," if size and size != count else ""
    work = f"{epochs} epochs" if epochs else f"{training.get('local_steps', 10)} steps"
    partition = clients.get("partition", {"name": "iid"})
    keys = ("alpha", "column", "labels_per_client")
    options = [f"{key} {_shorten(partition[key])}" for key in keys if key in partition]
    rows = _shorten(task.get("name", "a task")) + (f" ({_shorten(task['data'])})" if task.get("data") else "")
    how = f"rows split by {_shorten(partition.get('name', 'iid'))}{f' ({options[0]})' if options else ''}"
    who = f"{count} {'client' if count == 1 else 'clients'}{cohort}"
    model = _shorten(table.get("model", {}).get("name", "a model"))
    return f"{who} trained {adapters}adapters of {model} for {rows}, {how}, in {table.get('rounds')} rounds of {work}"


def _describe_results(runs: Sequence[Run]) -> str:
    """Name the best method for each kind of model by the paired test over seeds."""
    texts = []
    for key, what in (("global", "shared model"), ("clients", "clients' own models, in the mean,")):
        values = {_shorten(label): figures for label, figures in group_figures(runs, key).items()}
        best = rank(values, runs[0].higher)
        if best is not None:
            verb = "did best with" if not best.level else "had no winner; ahead by the mean was"
            texts.append(f"the {what} {verb} {best.first}: {get_metric(runs)} {best.mean:.4f} ({best.verdict})")
        elif values:
            texts.append(f"the {what} reached {get_metric(runs)} {fmean(next(iter(values.values())).values()):.4f}")
    return f"At the last evaluated round {'; '.join(texts)}." if texts else "No round has been evaluated yet."


def list_commands(runs: Sequence[Run]) -> list[str]:
    """List the commands that repeat the runs with the same bits."""
    files = [shlex.quote(display_safe(run.folder / CONFIG, 4000)) for run in runs]
    return [f"fedlora run {file} --out {shlex.quote(f'again/{run.name}')}" for file, run in zip(files, runs)]


def describe_run(run: Run) -> list[tuple[str, str]]:
    """List state, seed, versions, hardware and privacy of one run, each as a name and a text."""
    summary = run.summary or {}
    rows = [("state", run.state), ("seed", str(run.seed))]
    rows.append(("rounds", f"{len(run.digest.rounds)} of {run.digest.asked}"))
    rows += [(f"version of {display_safe(k, 60)}", display_safe(v, 60)) for k, v in summary.get("versions", {}).items()]
    rows += [(display_safe(k, 60), display_safe(v, 60)) for k, v in summary.get("machine", {}).items()]
    if not summary:
        rows.append(("versions and hardware", "written when the run ends"))
    if run.failure:
        rows.append(("why it diverged", display_safe(run.failure)))
    if summary and not is_complete(summary):
        rows.append(("clients' own figures are over", describe_scored_clients(summary)))
        rows += fault_lines(summary)
    if summary.get("resumed"):
        rows.append(("resumed after round", ", ".join(map(str, summary["resumed"]))))
    if summary.get("privacy"):
        rows += [(name, display_safe(value)) for name, value in Privacy.describe(summary["privacy"])]
    return rows + [("note", display_safe(note, 2000)) for note in summary.get("notes", ())]


def _shorten(value: object) -> str:
    return display_safe(value, WORDS)
