"""Everything public is on the page of the Python interface, is explained, and is used in an example that runs."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import fedlora as fl
from fedlora.methods.svd import BestRank
from tests.docs import blocks, standins

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
NAMES = [name for name in fl.__all__ if name != "__version__"]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(fl, name))]
OTHERS = [name for name in NAMES if name not in FUNCTIONS]


def example(value) -> str:
    """The indented code of a docstring, before its sections; empty without any."""
    text, _, _ = inspect.getdoc(value).partition("\nArgs:")
    found = re.findall(r"(?<=\n\n)((?: {4}.*\n|\n)+)", text + "\n")
    return textwrap.dedent("".join(found)).strip()


def resolved(path: str):
    """The object of a dotted path, as the site's generator finds it."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value = __import__(".".join(parts[:cut]), fromlist=["x"])
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise LookupError(path)


@pytest.fixture(scope="module")
def described():
    """The objects that the page describes."""
    return [resolved(path) for path in re.findall(r"^::: (\S+)$", PAGE.read_text(encoding="utf-8"), re.M)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_explained_and_on_the_page(name, described):
    value = getattr(fl, name)
    assert (inspect.getdoc(value) or "").strip(), f"{name} has no docstring"
    if inspect.ismodule(value):
        assert f"`fl.{name}`" in PAGE.read_text(encoding="utf-8")
    else:
        assert any(value is other for other in described), f"{name} is not on docs/api.md"


@pytest.mark.parametrize("name", OTHERS)
def test_a_block_of_the_page_uses_it(name):
    """The blocks run in test_blocks.py."""
    code = [block for block in blocks.blocks(PAGE, ROOT) if block.language == "python" and "not run" not in block.said]
    assert any(re.search(rf"\bfl\.{name}\b", block.text) for block in code), f"no block of docs/api.md uses fl.{name}"


def test_a_planted_name_is_missed(described):
    assert not any(BestRank is other for other in described)
    assert example(textwrap) == "" and example(fl.plan).startswith("plan = fedlora.plan(")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the examples of docstrings name: a configuration, a finished run and three adapters."""
    folder = tmp_path_factory.mktemp("examples")
    standins.quick(folder, "mine.toml")
    fl.run(folder / "mine.toml", folder / "runs" / "mine-1")
    for name in "abc":
        fl.open(folder / "runs" / "mine-1").export(folder / name)
    return folder


@pytest.mark.parametrize("name", [*FUNCTIONS, "Config"])
def test_the_example_of_its_docstring_runs(name, folder, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(folder)
    code = example(getattr(fl, name))
    assert re.search(rf"\bfedlora\.{name}\b", code), f"the docstring of {name} has no example"
    exec(compile(code, f"<docstring of {name}>", "exec"), {"fedlora": fl})
