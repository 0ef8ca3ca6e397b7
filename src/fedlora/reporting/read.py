"""A run's folder as plain values."""

import json
from pathlib import Path
from typing import Any


def folder(path: Path) -> dict[str, Any]:
    """``{"rows", "runs"}`` of a comparison, ``{"summary", "records"}`` of a run, or ``ValueError``."""
    comparison, summary = path / "comparison.json", path / "summary.json"
    if comparison.exists():
        return _json(comparison)
    if not summary.exists() and any(file for way in ("*", "trials/*") for file in path.glob(f"{way}/summary.json")):
        raise ValueError(f"{str(path)!r} holds the folders of runs and no comparison of them; name one of these.")
    if not summary.exists():
        raise ValueError(
            f"{str(path)!r} holds no finished run: it has no summary.json; name a folder `fedlora run` made."
        )
    return {"summary": _json(summary), "records": records(path)}


def records(path: Path) -> list[dict[str, Any]]:
    """The rounds of a run, as written so far."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not readable JSON: {error}; it was cut short or edited.") from error
