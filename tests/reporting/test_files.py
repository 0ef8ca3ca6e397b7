"""Figures and tables as files: sizes, marks, and nothing that a name could break."""

import csv
import io
import json
import re

import pytest

from fedlora.reporting.figures import draw_figures
from fedlora.reporting.files import format_csv, format_latex, format_markdown, write_files
from fedlora.reporting.load import load_runs
from fedlora.runs.table import Column, Table
from tests.fixtures.run_folders import write_comparison, write_run

ODD = Table("odd", "Odd", (Column("name", "a_b & c"), Column("x", "x", 2)), [{"name": "50% of #1_{x}|<b>", "x": 1.005}])


def test_figures_are_as_wide_as_a_column_and_have_a_mark_for_every_row(tmp_path):
    more = {"quarantined": {"1": "odd"}, "privacy": {"epsilon": 2.0, "delta": 1e-5}}
    found = load_runs([write_comparison(tmp_path / "c", methods=("fedit", "svd"), seeds=(0, 1), more=more)])
    written, absent = write_files(found, tmp_path / "out")
    assert [figure.name for figure in absent] == ["oracle"]
    shown = [figure for figure in draw_figures(found) if figure.chart is not None]
    assert len(written) == 3 * len(shown) + 3 * len(list((tmp_path / "out").glob("*.csv")))
    for figure in shown:
        svg = (tmp_path / "out" / f"{figure.name}.svg").read_text()
        assert float(re.search(r'width="([\d.]+)pt"', svg).group(1)) == pytest.approx(84 / 25.4 * 72, abs=1)
        kind = rf'class="mark-{figure.mark} role-mark[^"]*"[^>]*>(.*?)</g>'
        marks = sum(group.count("<path") for group in re.findall(kind, svg, re.S))
        assert marks == len(figure.table.rows), figure.name
        pdf = (tmp_path / "out" / f"{figure.name}.pdf").read_bytes()
        assert pdf[:4] == b"%PDF" and float(re.search(rb"MediaBox ?\[0 0 ([\d.]+)", pdf).group(1)) == pytest.approx(
            238.1, abs=1
        )
        png = (tmp_path / "out" / f"{figure.name}.png").read_bytes()
        assert int.from_bytes(png[16:20], "big") == pytest.approx(84 / 25.4 * 300, abs=4)


def test_csv_has_all_digits_and_no_formula(tmp_path):
    table = Table("t", "T", (Column("name", "name"), Column("x", "x", 2, "x_std")), [
        {"name": "=HYPERLINK(1)", "x": 0.123456789, "x_std": 0.5}, {"name": 'a,"b"', "x": None},
    ])  # fmt: skip
    rows = list(csv.reader(io.StringIO(format_csv(table))))
    assert rows == [["name", "x", "x, standard deviation"], ["'=HYPERLINK(1)", "0.123456789", "0.5"], ['a,"b"', "", ""]]


def test_latex_and_markdown_escape_what_they_would_obey():
    tex = format_latex(ODD)
    assert r"a\_b \& c & x \\" in tex and r"50\% of \#1\_\{x\}\textbar{}\textless{}b\textgreater{} & 1.00 \\" in tex
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lr}"):
        assert rule in tex
    line = format_markdown(ODD).splitlines()[2]
    assert line == r"| 50% of \#1\_{x}\|&lt;b&gt; | 1.00 |" and len(re.findall(r"(?<!\\)\|", line)) == 3


def test_what_is_small_is_not_written_as_nothing():
    column = Column("p", "p", 4)
    texts = [column.text({"p": value}) for value in (3e-5, 6e-5, 0.0, None, float("nan"))]
    assert texts == ["<0.0001", "0.0001", "0.0000", "–", "–"]


def test_a_width_that_is_none_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="--width is 2; .* from 20 to 600"):
        write_files(load_runs([write_run(tmp_path / "r")]), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_the_commands(tmp_path, monkeypatch, capsys):
    import sys

    from fedlora.cli import main

    run = write_run(tmp_path / "r")
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda: "")
    for arguments, status in ((["report", str(run), "--out", str(tmp_path / "r.html")], 0), (["report", str(tmp_path)], 0),
                              (["report", str(tmp_path / "none")], 2), (["plots", str(run), "--out", str(tmp_path / "p"), "--json"], 0)):  # fmt: skip
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fedlora", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == status, capsys.readouterr().err
    said = json.loads(capsys.readouterr().out)
    assert len(said["files"]) > 30 and said["absent"]["oracle"]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>") and (tmp_path / "report.html").exists()
