"""Accuracy against megabytes for each codec: one federation, the same seeds, and only ``[compression]`` differs.

``python -m benchmarks.compression --models DIR --data DIR --minutes 60`` runs what is missing and stops in time; what
was finished is never run again. ``--table`` prints what there is. ``-o KEY=VALUE`` lays settings over all runs, and
``--results`` names another folder: short trials do not belong among the results.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import RESULTS, SEEDS, Book, Study, figures, table
from benchmarks.study_tables import spread
from fedlora.runs.compare import execute
from fedlora.runs.comparison import Cell
from fedlora.runs.config import build
from fedlora.schema import apply_overrides

STUDY = Study("fedrot-lora/banking77-small.toml", ())
METHODS = {"fedit": 2e-2, "fedex-lora": 2e-2, "fedsa-lora": 6e-3}  # the rates that the studies on Banking77 chose
FEEDBACK = "compression.error_feedback=true"
FORMS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16 both ways": ("compression.up=bfloat16", "compression.down=bfloat16"),
    "float16 both ways": ("compression.up=float16", "compression.down=float16"),
    "int8 up": ("compression.up=int8",),
    "int8 both ways": ("compression.up=int8", "compression.down=int8"),
    "int8 both ways, feedback": ("compression.up=int8", "compression.down=int8", FEEDBACK),
    "int4 up, int8 down": ("compression.up=int4", "compression.down=int8"),
    "int4 up, int8 down, feedback": ("compression.up=int4", "compression.down=int8", FEEDBACK),
    "top 10 % up, int8 down": ("compression.top_k=0.1", "compression.down=int8"),
    "top 10 % up, int8 down, feedback": ("compression.top_k=0.1", "compression.down=int8", FEEDBACK),
    "top 10 % in int8 up, int8 down, feedback": (
        "compression.top_k=0.1", "compression.up=int8", "compression.down=int8", FEEDBACK,
    ),
    "top 1 % in int8 up, int8 down, feedback": (
        "compression.top_k=0.01", "compression.up=int8", "compression.down=int8", FEEDBACK,
    ),
    "bfloat16 both ways and base updates": (
        "compression.up=bfloat16", "compression.down=bfloat16", "compression.base_updates=bfloat16",
    ),
}  # fmt: skip


def missing(book: Book, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The runs that are not in the book, seed by seed."""
    for seed in SEEDS:
        for form in FORMS:
            for method in methods:
                key = {"phase": "run", "setting": form, "label": method, "seed": seed}
                if book.find(**key) is None:
                    yield {**key, "rate": METHODS[method]}


def cell(done: Sequence[dict[str, Any]]) -> list[str]:
    """Megabytes a run up and down, and the score with its deviation over seeds."""
    if not done:
        return ["–", "–"]
    sent = " + ".join(f"{statistics.fmean(r['bytes'][d] for r in done) / 1e6:.2f}" for d in ("up", "down"))
    return [sent, spread([r["value"] for r in done], 3)]


def printed(book: Book) -> None:
    """The table as Markdown: a line a form, and each method's megabytes and score."""
    print("| | " + " | ".join(f"{m}: MB up + down | score" for m in METHODS) + " |\n" + "|---" * 7 + "|")
    for form in FORMS:
        found = [
            [r for r in book.rows if (r["label"], r["setting"]) == (m, form) and r["value"] is not None]
            for m in METHODS
        ]
        print(f"| {form} | " + " | ".join(text for done in found for text in cell(done)) + " |")


def main() -> None:
    """Runs what is missing, as far as the time goes."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", type=Path, help="folder of models")
    options.add_argument("--data", type=Path, help="folder of data sets")
    options.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=[*METHODS, []])
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("-o", dest="overrides", action="append", default=[], help="a setting of all runs: key=value")
    options.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    asked, began = options.parse_args(), time.monotonic()
    book = Book.of("compression", asked.results)
    if asked.table:
        return printed(book)
    if asked.models is None or asked.data is None:
        options.error("--models and --data are needed to run anything")
    while time.monotonic() - began < asked.minutes * 60:
        key = next(missing(book, asked.methods), None)
        if key is None:
            break
        own = table(STUDY, key, (), asked.models, asked.data)
        own = apply_overrides(own, [*FORMS[key["setting"]], *asked.overrides])
        build(own)
        book.add({**key, **figures(execute(Cell(key["label"], key["seed"], own, None), threads=1), STUDY.clients)})
        print(json.dumps({k: book.rows[-1].get(k) for k in (*key, "value", "bytes", "seconds")}), flush=True)


if __name__ == "__main__":
    main()
