"""Notebooks run from their first cell to their last, and their stored outputs are those that a reader sees."""

import getpass
import re
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
pytest.importorskip("nbclient", reason="needs the dev extra")
pytest.importorskip("ipykernel", reason="needs the dev extra")
notebooks = pytest.importorskip("scripts.notebooks")

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SIZE = 300_000  # bytes
ABSOLUTE = re.compile(r"(?:^|(?<=[\s\"'(=]))/(?:\w[\w.-]*/)+\w|[A-Z]:\\\\?\w", re.M)
ADDRESS = re.compile(r"https?://|(?:pypi|files\.pythonhosted)\.org|index-url|file://", re.I)


def faults(text: str) -> list[str]:
    """Absolute paths, and addresses."""
    return ABSOLUTE.findall(text) + ADDRESS.findall(text)


def outputs(notebook) -> list[str]:
    """Everything that is shown, as text."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [text for x in found for text in ([x.text] if x.output_type == "stream" else x.get("data", {}).values())]


def shows_something(source: str) -> bool:
    """Whether a cell prints, or ends with an expression."""
    last = compile(source, "cell", "exec", flags=0x400).body[-1]  # 0x400: the syntax tree only
    return type(last).__name__ == "Expr" or "print(" in source


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def path(request):
    return request.param


def test_there_is_one():
    assert PATHS


def test_what_a_cell_shows_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run in one go, from the first"
    for number, cell in enumerate(code, 1):
        assert bool(cell.outputs) == shows_something(cell.source), f"code cell {number} of {path.name}"
        assert not [x for x in cell.outputs if x.output_type == "error" or x.get("name") == "stderr"], number
    assert path.stat().st_size < SIZE


def test_it_names_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    assert not [(fault, text[:80]) for text in sources + outputs(notebook) for fault in faults(text)]
    words = set(re.findall(r"[\w.-]+", "\n".join(outputs(notebook)))) - set(re.findall(r"[\w.-]+", "\n".join(sources)))
    assert not words & {getpass.getuser(), socket.gethostname()}
    assert "timestamp" not in path.read_text() and set(notebook.metadata) == {"kernelspec", "language_info"}


def test_planted_faults_are_found(path):
    for text in ("in /usr/lib/x.py:3", "'/data/set'", "C:\\Users\\a", "https://example.org"):
        assert faults(text), text
    assert not faults("correct / count, runs/own and <td>0.5</td> and docs/own-model.md")
    notebook = nbformat.read(path, as_version=4)
    changed = deepcopy(notebook)
    number = next(i for i, cell in enumerate(changed.cells) if cell.get("outputs"))
    changed.cells[number]["outputs"] = []
    assert not notebooks.describe_differences(path, notebook)
    assert len(notebooks.describe_differences(path, changed)) == 1


def test_accidents_of_a_run_are_left_out():
    def stream(text):
        return nbformat.v4.new_output("stream", name="stdout", text=text)

    assert [x.text for x in notebooks.join_streams([stream("a\n"), stream("b\n")])] == ["a\nb\n"]
    table = nbformat.v4.new_output("execute_result", data={"text/html": "<table>", "text/plain": "x" * 5000})
    notebooks.drop_long_text([table])
    assert list(table.data) == ["text/html"]


@pytest.mark.slow
def test_they_run_from_the_first_cell_to_the_last():
    found = subprocess.run(
        [sys.executable, "-m", "scripts.notebooks", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
