"""The site builds without a warning, and opens in a browser without an error and without asking the network for anything."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which

import pytest

pytest.importorskip("mkdocs", reason="needs the docs extra")

ROOT = Path(__file__).parents[2]
OPENED = ("index.html", "quickstart.html", "round.html", "decision-guide.html", "methods/index.html", "methods/ravan.html",
          "cli.html", "api.html", "errors.html", "tutorials/hospitals.html")  # fmt: skip
pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium through Playwright's driver; nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the docs extra")
    chromium = which("chromium") or which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_site_has_every_page_and_names_no_other_place(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert not [page for page in pages if not (site / page).exists()]
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for tag in ("<script src=", '<link rel="stylesheet" href=', "<img src="):
            places = [part.split('"')[1] if '"' in part[:2] else part.split()[0] for part in text.split(tag)[1:]]
            assert not [place for place in places if place.startswith(("http:", "https:", "//"))], path
    assert "fonts.g" not in (site / "index.html").read_text(encoding="utf-8")


def test_the_api_page_has_every_public_name(site):
    import fedlora

    text = (site / "api.html").read_text(encoding="utf-8")
    shown = {name: (f'.{name}"', f"<code>fl.{name}</code>") for name in fedlora.__all__ if not name.startswith("_")}
    missing = [name for name, forms in shown.items() if not any(form in text for form in forms)]
    assert not missing, f"docs/api.md has no {missing}"


def test_examples_that_pages_link_to_are_in_the_site(site):
    page = (site / "tutorials" / "researcher.html").read_text(encoding="utf-8")
    assert "../project/examples/banking77-compare.toml.txt" in page
    copy = site / "project" / "examples" / "banking77-compare.toml.txt"
    assert copy.read_text() == (ROOT / "examples" / "banking77-compare.toml").read_text()


def listened(page) -> tuple[list[str], list[str]]:
    """What goes wrong on a page and what it asks for, from now on."""
    faults: list[str] = []
    asked: list[str] = []
    page.on("console", lambda said: faults.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    # What is still on its way when the page is left was given up by the browser: only the rest is a fault.
    left = "net::ERR_ABORTED"
    page.on("requestfailed", lambda one: faults.append(f"{one.failure}: {one.url}") if one.failure != left else None)
    return faults, asked


@pytest.mark.slow
@pytest.mark.parametrize("width,scheme", [(1280, "light"), (390, "dark")])
def test_pages_open_without_an_error_and_ask_nobody(browser, address, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    faults, asked = listened(page)
    for name in OPENED:
        page.goto(f"{address}/{name}", wait_until="networkidle")
        assert page.locator("h1").count() == 1, name
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 1, f"{name} scrolls sideways by {wide} pixels at {width}"
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert not broken, f"{name}: {broken}"
    context.close()
    assert not faults, faults
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked), set(asked)


@pytest.mark.slow
def test_the_search_finds_a_method_from_a_disk(browser, site):
    page = browser.new_page()
    _, asked = listened(page)
    page.goto((site / "index.html").as_uri(), wait_until="networkidle")  # what is typed before its scripts run is lost
    # The field listens to keys: what is filled in at once it may miss.
    page.locator("input.md-search__input").press_sequentially("rotational")
    page.locator(".md-search-result__item").first.wait_for(timeout=120_000)
    assert "FedRot" in page.locator(".md-search-result__list").inner_text()
    page.close()
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), set(asked)


def test_the_index_of_the_search_knows_every_page(site):
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    known = {one["location"].partition("#")[0] for one in found["docs"]}
    assert {"methods/ravan.html", "limitations.html", "errors.html"} <= known
