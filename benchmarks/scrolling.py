"""How the report of many runs scrolls: the time between two frames, in headless Chromium.

``python -m benchmarks.scrolling`` makes up 50 runs of 200 rounds and 100 clients, opens their report and turns the
wheel from its top to its end, once. A blank page of the same height is scrolled likewise: what to compare with.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.report import make
from fedlora.reporting.html import render_page
from fedlora.reporting.load import load_runs

STEP = 400  # pixels a turn of the wheel
WATCH = """() => {
    window.frames_ = []; window.long_ = [];
    new PerformanceObserver(list => list.getEntries().forEach(entry => long_.push(entry.duration)))
        .observe({type: "longtask"});
    let before = performance.now();
    const next = now => { frames_.push(now - before); before = now; requestAnimationFrame(next); };
    requestAnimationFrame(next);
}"""


def scrolled(tab: Any) -> dict[str, float]:
    """Milliseconds between frames while the page goes by, and tasks that kept it busy for more than 50."""
    height = tab.evaluate("document.documentElement.scrollHeight")
    tab.mouse.move(640, 450)
    tab.evaluate(WATCH)
    for _ in range(0, height, STEP):
        tab.mouse.wheel(0, STEP)
        tab.wait_for_timeout(30)
    found = [float(x) for x in tab.evaluate("frames_")][2:]
    long = tab.evaluate("long_")
    return {
        "pixels": height, "frames": len(found), "ms a frame, median": median(found),
        "ms a frame, 99 %": quantiles(found, n=100)[98], "ms a frame, most": max(found),
        "tasks over 50 ms": len(long),
    }  # fmt: skip


def measure(many: int = 50, rounds: int = 200, clients: int = 100) -> dict[str, Any]:
    """The report's figures, and a blank page's."""
    from playwright.sync_api import sync_playwright

    with TemporaryDirectory() as place, sync_playwright() as driver:
        made = Path(place) / "report.html"
        made.write_text(render_page(load_runs(make(Path(place), many, rounds, clients))), encoding="utf-8")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(600_000)
        began = time.perf_counter()
        tab.goto(made.as_uri())
        tab.wait_for_function("document.documentElement.dataset.ready === 'yes'")
        drawn = time.perf_counter() - began
        report = scrolled(tab)
        tab.goto("about:blank")
        tab.set_content(f'<div style="height: {report["pixels"]}px"></div>')
        found = {"seconds until all is drawn": drawn, "report": report, "blank page": scrolled(tab)}
        browser.close()
    return found


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))
