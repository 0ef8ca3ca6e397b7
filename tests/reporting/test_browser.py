"""The report as a reader meets it: opened in headless Chromium, driven by Playwright, judged by axe-core.

``FEDLORA_SCREENSHOTS`` names a folder that keeps the pictures at three widths and in both themes.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from fedlora.reporting.html import render_page as written
from fedlora.reporting.load import load_runs
from tests.fixtures.run_folders import HOSTILE, write_comparison

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
PATIENCE = 120_000  # milliseconds
READY = "document.documentElement.dataset.ready === 'yes'"  # all is drawn
FIRST = (390, "dark")  # of the widths and themes, in the first tier
SIGHTS = [(width, theme) for width in (390, 768, 1280) for theme in ("light", "dark")]

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A comparison's report, with names that no one should obey."""
    place = tmp_path_factory.mktemp("report")
    more = {"quarantined": {"1": HOSTILE}, "privacy": {"epsilon": 2.0, "delta": 1e-5},
            "oracle": {"methods": {HOSTILE: {"error": 0.5}, "svd": {"error": 0.25}}}}  # fmt: skip
    folder = write_comparison(place / "c", methods=("fedit", "svd"), more=more)
    for path in folder.glob("*/rows.json"):
        path.write_text(json.dumps({"labels": [HOSTILE, "cat"], "clients": {HOSTILE: {"labels": [3, 4]}}}))
    (place / "report.html").write_text(written(load_runs([folder])), encoding="utf-8")
    return place / "report.html"


@pytest.fixture(scope="module")
def seen():
    """What the page said and asked for."""
    return {"console": [], "requests": []}


@pytest.fixture(scope="module")
def tab(report, seen):
    """The page, once all is drawn."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        tab.set_default_timeout(PATIENCE)
        tab.on("console", lambda message: seen["console"].append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: seen["console"].append(f"error: {error}"))
        tab.on("request", lambda request: seen["requests"].append(request.url))
        tab.goto(report.as_uri())
        tab.wait_for_function(READY)
        yield tab
        browser.close()


def test_nothing_is_said_and_nothing_asked_for(tab, seen, report):
    assert seen["console"] == []
    assert {url for url in seen["requests"] if not url.startswith(("data:", "blob:"))} == {report.as_uri()}
    blocked = tab.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')")
    assert blocked == "refused", "the policy of the page forbids it, too"
    seen["console"].clear()  # which Chromium remarks on


def test_the_keyboard_reaches_everything(tab):
    tab.reload()  # another test may have given the focus to something
    tab.wait_for_function(READY)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus can be seen"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    summary = tab.locator("#f-drift summary")
    summary.focus()
    tab.keyboard.press("Space")
    tab.wait_for_selector("#f-drift .rows td")
    assert tab.locator("#f-drift .rows tbody tr").count() == 6
    assert tab.locator("#f-drift .rows th").all_inner_texts() == ["method", "round", "client drift", "seeds"]


def test_every_figure_has_a_mark_for_every_row(tab):
    found = tab.evaluate("""[...document.querySelectorAll("figure[data-figure]")].map(figure => ({
        name: figure.id,
        marks: figure.querySelectorAll(`.mark-${figure.dataset.figure}.role-mark > path`).length,
        rows: JSON.parse(document.getElementById(figure.id + "-data").textContent).spec.datasets.rows.length,
        width: figure.querySelector("svg").getBoundingClientRect().width,
    }))""")
    assert len(found) >= 14
    for figure in found:
        assert figure["marks"] == figure["rows"] > 0, figure
        assert figure["width"] > 250, figure


def test_hostile_names_are_shown_and_not_obeyed(tab):
    assert tab.evaluate("document.images.length") == 0
    assert HOSTILE in tab.inner_text("#t-faults")
    labels = tab.evaluate("[...document.querySelectorAll('#f-labels svg text')].map(text => text.textContent)")
    assert any(text.startswith("<script>") for text in labels)


def column(tab, table: str, place: int) -> list[str]:
    return tab.eval_on_selector_all(f"#{table} tbody tr", f"rows => rows.map(row => row.cells[{place}].dataset.value)")


def test_tables_sort_by_click_and_by_key(tab):
    head = tab.locator("#t-runs thead th", has_text="global accuracy")
    place = head.evaluate("th => th.cellIndex")
    head.get_by_role("button").click()
    values = [float(value) for value in column(tab, "t-runs", place)]
    assert values == sorted(values) and len(set(values)) == 6
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").focus()
    tab.keyboard.press("Enter")
    assert [float(value) for value in column(tab, "t-runs", place)] == values[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    assert tab.locator("#t-runs th[aria-sort=descending]").count() == 1


@pytest.mark.parametrize(
    "width, theme", [pytest.param(*s, marks=pytest.mark.slow if s != FIRST else ()) for s in SIGHTS]
)
def test_it_fits_and_can_be_read(tab, width, theme, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=theme)
    tab.wait_for_function("""() => [...document.querySelectorAll(".chart svg")].every(
        svg => svg.getBoundingClientRect().width <= innerWidth)""")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    ink = tab.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill")
    assert ink == tab.evaluate("getComputedStyle(document.body).color"), "figures take the theme's colour"
    faults = [
        fault for fault in axe.Axe().run(tab).response["violations"] if fault["impact"] in ("serious", "critical")
    ]
    assert faults == [], [(fault["id"], [node["target"] for node in fault["nodes"]][:5]) for fault in faults]
    place = Path(os.environ.get("FEDLORA_SCREENSHOTS", tmp_path))
    place.mkdir(parents=True, exist_ok=True)
    assert len(tab.screenshot(path=place / f"report-{width}-{theme}.png", full_page=True)) > 10_000


@pytest.mark.slow
def test_it_prints_black_on_white(tab):
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill") == "rgb(0, 0, 0)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    tab.emulate_media(media="screen", color_scheme="light")
