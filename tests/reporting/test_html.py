"""The page as text: what is in it, what is escaped, how large it becomes."""

import json
import re
import tracemalloc
from html.parser import HTMLParser

import pytest

from fedlora.reporting import charts
from fedlora.reporting import figures as drawing
from fedlora.reporting.html import dump_script_json, render_page
from fedlora.reporting.load import load_runs
from tests.fixtures.run_folders import HOSTILE, write_comparison, write_run


class Read(HTMLParser):
    """Tags, text and scripts of a page, as a browser takes them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.data: dict[str, dict] = {}
        self._in = ("", {})
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in = (tag, dict(attrs))
        self.tags.append(self._in)

    def handle_endtag(self, tag):
        self._in = ("", {})

    def handle_data(self, data):
        tag, about = self._in
        if tag == "script" and about.get("type") == "application/json":
            self.data[about["id"]] = json.loads(data)
        elif tag not in ("script", "style"):
            self.text += data


@pytest.fixture(autouse=True)
def no_bundle(monkeypatch):
    """Vega itself is the browser test's matter, and takes seconds to be put together."""
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda: "")


def test_every_figure_has_its_rows_once_a_caption_and_a_text(tmp_path):
    found = load_runs([write_comparison(tmp_path / "c")])
    read = Read(render_page(found))
    shown = [figure for figure in drawing.draw_figures(found) if figure.chart is not None]
    assert len(shown) >= 12 and len(read.data) == len(shown)
    for figure in shown:
        about = read.data[f"f-{figure.name}-data"]
        assert about["spec"]["datasets"] == {"rows": json.loads(json.dumps(figure.table.rows))}
        assert figure.caption.split(" The worst")[0] in read.text
        assert any(about.get("aria-label") == figure.alt for _, about in read.tags)
    ids = [about["id"] for _, about in read.tags if "id" in about]
    assert len(ids) == len(set(ids))
    links = {about["href"][1:] for tag, about in read.tags if tag == "a"}
    assert links <= set(ids), "every link of the contents leads somewhere"


def test_what_is_not_there_is_a_sentence(tmp_path):
    read = Read(render_page(load_runs([write_run(tmp_path / "r", ended=False)])))
    for sentence in ("No upload was quarantined", "run fedlora compare CONFIG --oracle", "no guarantee of privacy"):
        assert sentence in read.text
    assert "f-oracle-data" not in read.data and "f-epsilon-data" not in read.data


def test_hostile_names_are_text(tmp_path):
    more = {
        "absent": {HOSTILE: HOSTILE},
        "quarantined": {"1": HOSTILE},
        "oracle": {"methods": {HOSTILE: {"error": 0.5}}},
    }
    folder = write_run(tmp_path / "a<b>&'\"", more=more)
    table = (folder / "config.toml").read_text().replace('"digits"', json.dumps(HOSTILE))
    (folder / "config.toml").write_text(table)
    (folder / "rows.json").write_text(json.dumps({"labels": [HOSTILE], "clients": {HOSTILE: {"labels": [3]}}}))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "notes": [HOSTILE], "versions": {HOSTILE: HOSTILE}}))
    text = render_page(load_runs([folder]))
    read = Read(text)
    assert "img" not in {tag for tag, _ in read.tags}
    assert not [about for _, about in read.tags if any(key.startswith("on") for key in about)]
    assert sum(tag == "script" for tag, _ in read.tags) == len(read.data) + 2
    assert read.text.count(HOSTILE) >= 5 and "a<b>&'\"" in read.text
    assert read.data["f-labels-data"]["spec"]["datasets"]["rows"][0]["target"] == HOSTILE[:60] + "..."


def test_json_in_a_script_cannot_end_it():
    text = dump_script_json({"</script>": "<!--\u2028&"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"</script>": "<!--\u2028&"}
    with pytest.raises(ValueError):
        dump_script_json(float("nan"))


def test_the_policy_names_the_pages_own_scripts_and_no_address(tmp_path):
    import base64
    import hashlib

    text = render_page(load_runs([write_run(tmp_path / "r")]))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_several_runs_have_a_table_to_sort_and_a_test(tmp_path):
    read = Read(render_page(load_runs([write_comparison(tmp_path / "c")])))
    assert [about.get("id") for tag, about in read.tags if tag == "table"][:3] == ["t-methods", "t-tests", "t-runs"]
    assert sum(about.get("aria-sort") == "none" for _, about in read.tags) > 10
    alone = Read(render_page(load_runs([write_comparison(tmp_path / "d", seeds=(0,))])))
    assert "There is no paired test" in alone.text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", [charts.LIGHT, charts.DARK])
def test_colours_stand_out_on_both_grounds(ground):
    for colour in charts.COLOURS:
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_a_method_keeps_its_colour(tmp_path):
    shown = {
        f.name: f.chart.to_dict(validate=False)
        for f in drawing.draw_figures(load_runs([write_comparison(tmp_path / "c")]))
        if f.chart
    }
    seen = {}
    for name in ("global-by-round", "clients-by-megabyte", "drift"):
        scale = shown[name]["layer"][-1]["encoding"]["color"]["scale"]
        for label, colour in zip(scale["domain"], scale["range"]):
            assert seen.setdefault(label, colour) == colour


@pytest.mark.slow
def test_a_large_report_stays_small(tmp_path):
    """10 runs, 100 rounds, 40 clients; the whole size is benchmarks/report.py's."""
    for number in range(10):
        write_run(tmp_path / f"r{number}", number=number % 3, rounds=100, clients=40, parts=8, seed=number)
        config = tmp_path / f"r{number}" / "config.toml"
        config.write_text(config.read_text().replace("local_steps = 10", f"local_steps = {number + 1}"))
    read = sum((tmp_path / f"r{number}" / "metrics.jsonl").stat().st_size for number in range(10))
    tracemalloc.start()
    text = render_page(load_runs([tmp_path / f"r{number}" for number in range(10)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text.encode()) < 3e6, "besides Vega's 0.9 MB"
    assert peak < 60e6 and read > 2e6
