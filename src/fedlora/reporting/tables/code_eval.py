"""The table of graded programs."""

from collections.abc import Mapping
from typing import Any

from fedlora.runs.table import Table, from_pairs


def grades(found: Mapping[str, Any]) -> Table:
    """The figures of a file of programs."""
    rows = [(name, f"{value:.4f}") for name, value in found["figures"].items()]
    rows += [("answers that pass", str(found["passed"]))]
    rows += [("problems without an answer, counted as wrong", str(found["missing"]))] if found["missing"] else []
    title = f"{found['answers']} answers to {found['problems']} problems"
    return from_pairs(title, [*rows, ("verdicts", found["verdicts"])])
