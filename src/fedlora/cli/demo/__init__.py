"""``fedlora demo``: a comparison on embedded data, with nothing to download."""

import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

METHODS = ("fedit", "ffa-lora", "rolora", "flora-na", "fedrot-lora", "fedsa-lora", "ravan", "local")


def run_demo(out: Path, jobs: int, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Run the embedded comparison into ``out``; returns its rows and the paths of its figures."""
    from fedlora.reporting.figures import draw_comparison
    from fedlora.reporting.load import load_cells
    from fedlora.runs.compare import compare
    from fedlora.runs.comparison import comparison_rows
    from fedlora.runs.config import read_table
    from fedlora.runs.progress import Cells

    with as_file(files(__name__) / "demo.toml") as path:
        table = read_table(path)
        say("Ten clients, 1,347 handwritten digits between them, unevenly split; a small ViT that was pretrained on")
        say("letters. Each trains a LoRA of rank 4 on its own digits; eight ways to combine them:")
        with Cells(len(METHODS), table["rounds"]) as progress:
            cells = compare(table, METHODS, [table["seed"]], out, jobs, progress.watch, progress.finish)
        shutil.copy(path, out / "demo.toml")
    return comparison_rows(cells), draw_comparison(load_cells(cells), out)
