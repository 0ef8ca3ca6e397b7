"""Who is behind the figures: absences, missing scores and quarantines are in every summary, table and report."""

import copy
import dataclasses

import pytest

from fedlora.comparison import Cell, rows
from fedlora.report import attendance, card, tables
from fedlora.report.notebook import Rounds
from fedlora.report.reading import runs
from fedlora.report.standing import methods, one_by_one
from fedlora.report.words import hardware
from fedlora.runs import summarise
from tests.fixtures.federation import config
from tests.report.world import write_run

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
    assert summary["quarantined"] == {"1": {"1": "its update is too large"}}


def test_the_closing_table_says_whom_its_mean_is_over(summary, capsys):
    tables.summary(summary, "runs/x")
    out = " ".join(capsys.readouterr().out.split())
    assert "mean over 2 of 3 clients" in out and "mean over clients" not in out and "spread over 2 of 3" in out
    assert f"client 2, away in round │ 3, 4: {GONE}" in out and "client 1, quarantined in round" in out


def test_a_notebook_and_a_card_say_it_too(summary, records):
    shown = Rounds()
    shown.summary, shown.records = summary, records
    assert "2 of 3 clients" in shown._repr_html_() and f"client 2, away in round 3, 4: {GONE}" in shown._repr_html_()
    about = {"client": None, "ranks": [2], "error": None}
    assert GONE in card.card(config(), {**summary, "labels": [0, 1]}, about, False)


def test_a_comparison_says_it_below_its_table(summary, capsys):
    found = rows([Cell("fedit", 0, {}, None, summary)])
    tables.comparison(found)
    assert f"fedit: seed 0, client 2, away in round 3, 4: {GONE}" in capsys.readouterr().out


def test_a_whole_run_says_nothing(reference, capsys):
    whole = reference("fedit").summary
    tables.summary(whole, "runs/x")
    out = capsys.readouterr().out
    assert "mean over clients" in out and "away" not in out
    assert attendance.whole(whole) and not attendance.lines(whole)


def test_a_reports_tables_say_it(summary, tmp_path):
    more = {"absent": {"2": GONE}, "clients": {"mean": 0.5, "worst": 0.4, "worst_client": 0, "each": [0.6, 0.4, None]}}
    (run,) = runs([write_run(tmp_path / "r", more=more)])
    (row,) = one_by_one([run]).rows
    assert (row["away"], row["over"]) == (3, "2 of 3 clients")
    assert {"away", "over"} <= {column.key for column in one_by_one([run]).columns}
    assert "2 of 3 clients" in methods([run]).note
    (whole,) = runs([write_run(tmp_path / "w")])
    assert not {"away", "over"} & {column.key for column in one_by_one([whole]).columns}
    said = dict(hardware(dataclasses.replace(run, summary=summary)))
    assert said["clients' own figures are over"] == "2 of 3 clients" and GONE in said["client 2, away in round"]
