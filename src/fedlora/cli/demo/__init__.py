"""``fedlora demo``: the whole job on embedded data, with nothing to download."""

import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

METHODS = ("fedit", "ffa-lora", "rolora", "flora-na", "fedrot-lora", "fedsa-lora", "ravan", "local")


def play(out: Path, jobs: int, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Runs the embedded comparison into ``out``; returns its rows and its figures."""
    from fedlora.reporting.figures import draw_comparison
    from fedlora.reporting.load import opened
    from fedlora.runs.compare import compare
    from fedlora.runs.comparison import comparison_rows
    from fedlora.runs.config import read_table
    from fedlora.runs.progress import Cells

    with as_file(files(__name__) / "demo.toml") as path:
        table = read_table(path)
        say("Ten parties, 1,347 handwritten digits between them, unevenly split; a small ViT that was pretrained on")
        say("letters. Each trains a LoRA of rank 4 on its own digits; eight ways to combine them:")
        with Cells(len(METHODS), table["rounds"]) as progress:
            cells = compare(table, METHODS, [table["seed"]], out, jobs, progress.watch, progress.done)
        shutil.copy(path, out / "demo.toml")
    finished = [opened(Path(cell.folder), cell.label) for cell in cells if cell.summary is not None]
    return comparison_rows(cells), draw_comparison(finished, out)
