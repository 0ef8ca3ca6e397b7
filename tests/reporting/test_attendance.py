"""Who is behind the figures: absences, missing scores and quarantines are in every summary, table and report."""

import copy
import dataclasses
import json
from html import unescape

import pytest

import fedlora
from fedlora.engines.clients import DROPPED
from fedlora.engines.loop import Event
from fedlora.export import model_card as card
from fedlora.reporting.figures import draw_comparison, draw_figures
from fedlora.reporting.files import write_files
from fedlora.reporting.html import describe_run, render_page
from fedlora.reporting.load import load_runs
from fedlora.reporting.tables.by_round import tabulate_curves
from fedlora.reporting.tables.comparison import (
    describe_coverage,
    tabulate_by_method,
    tabulate_comparison,
    tabulate_runs,
)
from fedlora.reporting.tables.run import tabulate_summary as tables_of
from fedlora.reporting.terminal import show
from fedlora.runs.attendance import describe_means, fault_lines, is_complete
from fedlora.runs.comparison import Cell, Compared, comparison_rows
from fedlora.runs.progress import Lines
from fedlora.runs.result import Rounds
from fedlora.runs.summary import summarise
from tests.fixtures.federation import config
from tests.fixtures.run_folders import write_run

GONE = "its node is not connected"


@pytest.fixture(scope="module")
def records(reference):
    """The reference run's, as if client 2 had been killed after round 2."""
    found = copy.deepcopy(list(reference("fedit").records))
    for record in found[2:]:
        record["absent"], record["unscored"] = {"2": GONE}, {"2": GONE}
        record["clients"]["each"][2] = None
    found[0]["quarantined"] = {"1": "its update is too large"}
    return found


@pytest.fixture(scope="module")
def summary(records):
    return {**summarise(config("rounds=4"), records, False, 1.0), "labels": []}


def test_the_summary_has_who_was_missing_and_when(summary):
    assert summary["absent"] == {"2": {"3": GONE, "4": GONE}} == summary["unscored"]
    assert summary["scored"] == {"clients": 2, "of": 3} and summary["last_rounds"]["fewest"] == 2
    assert summary["quarantined"] == {"1": {"1": "its update is too large"}}


def test_the_closing_table_says_whom_its_mean_is_over(summary, capsys):
    show(*tables_of(summary))
    out = " ".join(capsys.readouterr().out.split())
    assert "mean over 2 of 3 clients" in out and "mean over clients" not in out and "spread over 2 of 3" in out
    assert "last 3 evaluated rounds, of at least 2 of 3 clients" in out
    assert f"client 2, absent in round │ 3, 4: {GONE}" in out and "client 1, quarantined in round" in out


def test_a_notebook_and_a_card_say_it_too(summary, records):
    shown = Rounds()
    shown.summary, shown.records = summary, records
    assert "2 of 3 clients" in shown._repr_html_() and f"client 2, absent in round 3, 4: {GONE}" in shown._repr_html_()
    about = {"client": None, "ranks": [2], "error": None}
    assert GONE in card.write_card(config(), {**summary, "labels": [0, 1]}, about, False)


def test_a_comparison_says_it_below_its_table(summary, capsys):
    whole = {**summary, "scored": {"clients": 3, "of": 3}, "absent": {}, "unscored": {}, "quarantined": {}}
    cells = Compared([Cell("fedit", 0, {}, None, summary), Cell("svd", 0, {}, None, whole)])
    show(*tabulate_comparison(comparison_rows(cells)))
    out = capsys.readouterr().out
    assert f"fedit: seed 0, client 2, absent in round 3, 4: {GONE}" in out
    assert "fedit *: clients' own over seed 0: 2 of 3 clients" in out and "svd *" not in out
    marked = {line.split()[1]: line.count("*") for line in out.splitlines() if line.startswith("│")}
    assert marked == {"fedit": 2, "svd": 0}, "the mean and the worst client"
    page = cells._repr_html_()
    assert "fedit *: clients' own over seed 0: 2 of 3 clients" in unescape(page) and GONE in page and "svd" in page
    assert page.count(" *") == 3 and "svd:" not in page
    assert list(cells.frame()["scored"]) == [2, 3]


def test_the_python_api_and_json_have_it_too(tmp_path, commands):
    """Clients that drop out as the configuration asks are absent, and scored all the same."""
    result = fedlora.run(config("clients.dropout=0.5", "rounds=3"), tmp_path / "run")
    absent = {}
    for record in result.records:
        for client in record.get("absent", {}):
            absent.setdefault(str(client), {})[str(record["round"])] = DROPPED
    assert absent and result.summary["absent"] == absent
    assert result.summary["scored"] == {"clients": 3, "of": 3} and "unscored" not in result.summary
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["absent"] == absent
    shown = json.loads(commands.call(["fedlora", "show", "run", "--json"], tmp_path).stdout)["summary"]
    assert (shown["absent"], shown["scored"]) == (absent, {"clients": 3, "of": 3})
    assert "clients/scored" in result.frame().columns and DROPPED in result._repr_html_()


def test_clients_that_never_take_part_are_not_missing(tmp_path):
    result = fedlora.run(config("clients.new=1", "rounds=1", "evaluation.measure=false"), tmp_path / "run")
    assert result.summary["final"]["clients"]["each"][2] is None
    assert is_complete(result.summary) and result.summary["scored"] == {"clients": 2, "of": 2}
    (run,) = load_runs([tmp_path / "run"])
    assert describe_coverage(run) == "all" and run.digest.means == ""


@pytest.mark.parametrize(
    "scored, said",
    [
        ([3, 3, 3], ""),
        ([3, 3, 2, 2, 2], "mean over 2 of 3 clients in rounds 3–5"),
        ([2, 3, 1, 1], "mean over 2 of 3 clients in round 1, mean over 1 of 3 clients in rounds 3–4"),
        ([2, 3] * 6, "mean over 2 to 3 of 3 clients, fewer than all in 6 of 12 evaluated rounds"),
    ],
)
def test_means_over_fewer_are_told_by_rounds(scored, said):
    assert describe_means(enumerate(scored, 1), 3) == said


def test_figures_say_it_in_the_page_and_where_a_file_stands_alone(tmp_path):
    """Client 2 is not scored after round 2; a run in which all are is beside it."""
    gone = write_run(tmp_path / "gone", rounds=5)
    found = [json.loads(line) for line in (gone / "metrics.jsonl").read_text().splitlines()]
    for record in found[2:]:
        record["clients"]["each"][2] = None
        record["unscored"] = {"2": GONE}
    (gone / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    read = load_runs([gone, write_run(tmp_path / "whole", method="svd", rounds=5)])
    said = "Not over all clients: gone: mean over 2 of 3 clients in rounds 3–5."
    drawn = {figure.name: figure for figure in draw_figures(read)}
    for name, figure in drawn.items():
        assert (said in figure.caption) == (said in figure.remark) == name.startswith("clients-by"), name
    assert "Scored were only 2 of 3 clients in gone." in drawn["clients"].caption
    assert said in unescape(render_page(read)) and "figures are over 2 of 3 clients in gone" in render_page(read)
    table = tabulate_curves(read)
    assert said in table.note and "clients scored" in {column.title for column in table.columns}
    assert [r["scored"] for r in table.rows if (r["model"], r["label"]) == ("clients", "fedit")] == [3, 3, 2, 2, 2]
    write_files(read, tmp_path / "plots")
    svg = {name: (tmp_path / "plots" / f"{name}.svg").read_text() for name in ("clients-by-round", "global-by-round")}
    assert "rounds 3–5" in svg["clients-by-round"] and "rounds 3–5" not in svg["global-by-round"]
    assert draw_comparison(read, tmp_path) == [tmp_path / f"accuracy-by-{x}.png" for x in ("round", "megabyte")]
    text = (tmp_path / "accuracy-by-round.svg").read_text()
    assert "fedit, seed 0: mean over 2 of 3 clients in rounds 3–5" in text and "svd, seed 0" not in text
    whole = load_runs([tmp_path / "whole"])
    assert not any(figure.remark or "Not over all" in figure.caption for figure in draw_figures(whole))
    assert "clients scored" not in {column.title for column in tabulate_curves(whole).columns}


def test_a_log_counts_no_quarantined_turn(capsys):
    lines = Lines(1)
    for client in range(3):
        lines.watch(Event("turn", 0, client, 1.0))
    lines.watch(Event("quarantined", 0, 1, text="quarantined: nan"))
    lines.watch(Event("round", 0))
    assert capsys.readouterr().out.splitlines()[-1] == "round 1 of 1: 2 clients, mean loss 1.0000"


def test_a_whole_run_says_nothing(reference, capsys):
    whole = reference("fedit").summary
    show(*tables_of(whole))
    out = capsys.readouterr().out
    assert "mean over clients" in out and "absent" not in out
    assert is_complete(whole) and not fault_lines(whole)


def test_a_reports_tables_say_it(summary, tmp_path):
    more = {"absent": {"2": GONE}, "clients": {"mean": 0.5, "worst": 0.4, "worst_client": 0, "each": [0.6, 0.4, None]}}
    (run,) = load_runs([write_run(tmp_path / "r", more=more)])
    (row,) = tabulate_runs([run]).rows
    assert (row["away"], row["over"]) == (3, "2 of 3 clients")
    assert {"away", "over"} <= {column.key for column in tabulate_runs([run]).columns}
    assert "2 of 3 clients" in tabulate_by_method([run]).note
    (whole,) = load_runs([write_run(tmp_path / "w")])
    assert not {"away", "over"} & {column.key for column in tabulate_runs([whole]).columns}
    said = dict(describe_run(dataclasses.replace(run, summary=summary)))
    assert said["clients' own figures are over"] == "2 of 3 clients" and GONE in said["client 2, absent in round"]
