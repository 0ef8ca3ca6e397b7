"""Runs the notebooks of examples/notebooks/ from their first cell to their last, and stores their outputs.

    python -m scripts.notebooks            # runs them in place
    python -m scripts.notebooks --check    # writes nothing; exit status 1 if a cell fails or shows what is not stored

Each runs in an empty folder with one thread and without the network. Times are left out of the files.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
SECONDS = 300  # for one cell, on a machine that may be busy
LONGEST = 1000  # characters of the plain text beside an HTML table, which browsers do not show


def run_notebook(path: Path) -> Any:
    """Return the notebook with new outputs. Raises ``CellExecutionError`` for the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        sockets = {"transport": "ipc", "ip": str(Path(folder) / "kernel")}  # no port is opened
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}},
            record_timing=False, config=Config({"KernelManager": sockets}),
        )  # fmt: skip
        client.execute(env=build_environment(Path(folder)))
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"] = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell["outputs"] = join_streams(cell.outputs)
            drop_long_text(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of this machine
    nbformat.validate(notebook)
    return notebook


def build_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a kernel: this package, one thread, no network, and settings in the empty folder."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("FEDLORA")},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for widgets, which are not needed
        "IPYTHONDIR": str(folder / ".ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"),
    }


def join_streams(outputs: list[Any]) -> list[Any]:
    """Return outputs with one stream for lines that arrived in several messages, since their number is accidental."""
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1]["text"] += output.text
        else:
            joined.append(output)
    return joined


def drop_long_text(outputs: list[Any]) -> None:
    """Remove the plain text of outputs that are HTML tables, if it is long."""
    for output in outputs:
        data = output.get("data", {})
        if "text/html" in data and len(data.get("text/plain", "")) > LONGEST:
            del data["text/plain"]


def read_kinds(notebook: Any) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield each code cell's number and the kinds of its outputs: ``stream``, or the media types that are shown."""
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code":
            yield number, tuple("+".join(sorted(x.get("data", {}))) or x.output_type for x in cell.outputs)


def describe_differences(path: Path, new: Any) -> list[str]:
    """Return a line for each cell whose stored outputs are of other kinds than those that it shows now."""
    stored = dict(read_kinds(nbformat.read(path, as_version=4)))
    return [
        f"{path.name}, cell {number}: shows {', '.join(kinds) or 'nothing'}, and stored is "
        f"{', '.join(stored[number]) or 'nothing'}"
        for number, kinds in read_kinds(new)
        if kinds != stored[number]
    ]


def main() -> None:
    """Run all notebooks, and write them or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stored outputs are out of date")
    only_check = parser.parse_args().check
    differences: list[str] = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        try:
            notebook = run_notebook(path)
        except CellExecutionError as error:
            sys.exit(f"{path.name}: {error}")
        if only_check:
            differences += describe_differences(path, notebook)
        else:
            nbformat.write(notebook, path)
            print(path.relative_to(ROOT))
    if differences:
        sys.exit("\n".join([*differences, "Run `python -m scripts.notebooks` and commit what it writes."]))


if __name__ == "__main__":
    main()
