"""Generated pages are what the generator makes; figures in pages come from measured results; links lead somewhere."""

import re
from pathlib import Path

import pytest
from scripts.pages import measured
from scripts.pages.__main__ import DOCS, made, stale

from fedlora.methods import METHODS
from fedlora.reporting import method_catalog

LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<to>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
ROOT = DOCS.parent


@pytest.fixture(scope="module")
def files():
    return made()


def test_generated_pages_are_up_to_date(files):
    wrong = [str(path.relative_to(ROOT)) for path in stale(files)]
    assert not wrong, f"out of date: {wrong}; run `python -m scripts.pages` and commit what it writes"


def test_an_edit_of_a_generated_page_or_figure_is_found(files, tmp_path):
    page = DOCS / "methods" / "ravan.md"
    assert stale({**files, page: files[page] + "x"}) == [page]
    assert stale({path: text for path, text in files.items() if path != page}) == [page]


def test_every_method_says_when_to_use_it_and_when_not(files):
    for name in METHODS.names():
        one, text = method_catalog.describe_method(name), files[DOCS / "methods" / f"{name}.md"]
        assert len(one["use"].split()) > 4 and len(one["avoid"].split()) > 4, name
        assert "Use it when" not in one["reference"] and one["reference"]
        for title in ("The equation", "What it claims", "What it costs", "Source"):
            assert f"## {title}" in text, (name, title)


def test_every_command_is_on_its_page(files):
    from typer.main import get_command

    from fedlora.cli import app

    text = files[DOCS / "cli.md"]
    for name, one in get_command(app).commands.items():
        for path, command in [(f"{name} {k}", v) for k, v in getattr(one, "commands", {}).items()] or [(name, one)]:
            assert f"\n## fedlora {path}\n" in text
            section = text.partition(f"\n## fedlora {path}\n")[2].partition("\n## ")[0]
            assert all(
                f"`{p.opts[0]}" in section for p in command.params if p.param_type_name == "option" and not p.hidden
            )


def test_figures_are_read_from_the_results(tmp_path):
    rows = "## One table\n\n| | score | x |\n|---|---|---|\n| a, b | **0.5 ± 0.1** | 2, 3 |\n"
    found = measured.Results(list(measured.tables(rows)), {"s": [
        {"label": "a", "value": 0.25, "global": None, "clients": {"mean": 0.2, "worst": 0.0}, "bytes": {"up": 3e6}, "metric": "m"},
        {"label": "a", "value": 0.75, "global": None, "clients": {"mean": 0.4, "worst": 0.0}, "bytes": {"up": 3e6}, "metric": "m"},
    ]})  # fmt: skip
    page = "x <!-- = results; One; b; sco -->old<!-- . --> and <!-- = study; s; a; value --><!-- . -->"
    filled = found.filled(page, "p.md")
    assert ">0.5 ± 0.1<" in filled and ">0.500 ± 0.354<" in filled and found.filled(filled, "p.md") == filled
    assert found.cell("One", "a", "x") == "2" and found.cell("One", "b", "x") == "3"
    assert "| a | – | 0.300 ± 0.141 | 0.000 | 3.00 | 2 |" in found.table("s")
    for wrong in ("results; One; c; score", "results; Two; a; score", "study; s; b; value", "nonsense; a"):
        with pytest.raises(ValueError, match=r"p\.md asks for"):
            found.filled(f"<!-- = {wrong} --><!-- . -->", "p.md")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def anchors(text: str) -> set[str]:
    bare = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return {measured.anchor(re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("# "))) for line in bare.splitlines() if line.startswith("#")}  # fmt: skip


@pytest.mark.parametrize("path", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_work_on_a_plain_file_browser(path):
    text = path.read_text(encoding="utf-8")
    bare = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
    for link in LINK.finditer(bare):
        to, _, part = (link["to"] or link["image"]).partition("#")
        if to.startswith(("http://", "https://", "mailto:")):
            continue
        target = (path.parent / to).resolve() if to else path
        assert target.exists(), f"{path.name}: {link[0]} leads nowhere"
        if part and target.suffix == ".md":
            assert part in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link[0]} has no such heading"
