"""Frames and pictures of runs and comparisons."""

import html.parser
import math

import pytest

from fedlora.runs.comparison import Cell, Compared
from fedlora.runs.record import round_figures
from fedlora.runs.result import Rounds
from fedlora.runs.table import Table, to_html
from tests.fixtures.callbacks import RECORD


class Of(Rounds):
    summary = {
        "title": "<b>FedIT</b>", "method": "fedit", "rounds": 2, "seed": 0, "metric": {"name": "accuracy", "higher": True},
        "interrupted": True, "quarantined": {"3": {"1": "<script>alert(1)</script>"}},
    }  # fmt: skip
    records = ({**RECORD, "round": 1}, {**RECORD, "round": 2, "loss": {}, "global": {}})


class Reader(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_frame_has_a_row_a_round_under_the_trackers_names():
    frame = Of().frame()
    assert list(frame.index) == [1, 2] and frame.index.name == "round"
    assert frame.loc[1].dropna().to_dict() == pytest.approx(round_figures(Of.records[0]))
    assert math.isnan(frame.loc[2, "train/loss"]) and frame.loc[2, "clients/mean"] == 0.6


def test_a_frame_of_clients():
    frame = Of().clients_frame()
    assert list(frame.columns) == ["round", "client", "loss", "accuracy"]
    assert frame[frame["round"] == 1].values.tolist()[0] == [1, 0, 2.0, 0.8]
    first = frame[(frame["round"] == 1) & (frame.client == 2)].iloc[0]
    assert first.loss == 1.0 and math.isnan(first.accuracy)


def test_a_run_is_shown_and_names_are_text():
    text = Of()._repr_html_()
    read = Reader(text)
    assert not read.open and set(read.tags) == {"table", "caption", "thead", "tr", "th", "tbody", "td", "p"}
    assert "&lt;b&gt;FedIT" in text and "<b>" not in text and "<script" not in text
    assert "stopped before its end" in text and "0.2" in text
    assert "\\x1b" in to_html(Table("t", "a\x1b[2J", (), [])) and "\x1b" not in to_html(Table("t", "a\x1b[2J", (), []))


def test_a_comparison_as_a_frame_and_shown():
    summary = {
        "metric": {"name": "accuracy", "higher": True}, "bytes": {"up": {"adapter": 2_000_000}, "down": {}},
        "errors": {"served": 0.1}, "seconds": {"whole": 3.0}, "final": {"global": {"accuracy": 0.5}},
    }  # fmt: skip
    cells = Compared([Cell("fed<it>", 0, {}, "a", summary), Cell("ravan", 0, {}, None, failure="nan")])
    frame = cells.frame()
    assert frame["global"].tolist()[0] == 0.5 and math.isnan(frame["global"].tolist()[1])
    assert frame["mb_up"][0] == 2.0 and list(frame.method) == ["fed<it>", "ravan"]
    text = cells._repr_html_()
    assert "fed&lt;it&gt;" in text and not Reader(text).open
    assert cells == list(cells), "a list as before"
