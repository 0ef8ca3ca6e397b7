"""A round's record as plain named numbers: what trackers log, frames hold and live views draw.

The names are a promise: ``docs/trackers.md`` lists them and a test pins them.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from fedlora.engines.record import Direction, RoundRecord
from fedlora.runs.attendance import scored

CLIENTS: tuple[Literal["mean", "examples_mean", "worst", "spread"], ...] = ("mean", "examples_mean", "worst", "spread")
FAULTS: tuple[Literal["absent", "unscored", "quarantined", "stragglers"], ...] = (
    "absent", "unscored", "quarantined", "stragglers",
)  # fmt: skip
DIRECTIONS: tuple[Direction, ...] = ("up", "down")


def figures(record: RoundRecord) -> dict[str, float]:
    """Name -> value of all that a round's record counts; what it does not have is left out, and so is what is nan.

    ``aggregation/`` are means over the adapted weights, ``bytes_up/`` and ``bytes_down/`` sums over the clients.
    """
    return {name: float(value) for name, value in _named(record) if value is not None and math.isfinite(value)}


def _named(record: RoundRecord) -> Iterator[tuple[str, float | None]]:
    losses = [loss for loss in record.get("loss", {}).values() if loss is not None]
    if losses:
        yield "train/loss", statistics.fmean(losses)
    yield "train/clients", len(record.get("cohort", ()))
    for name, value in record.get("global", {}).items():
        yield f"global/{name}", value
    for name in CLIENTS:
        yield f"clients/{name}", record.get("clients", {}).get(name)
    if record.get("clients", {}).get("each"):
        yield "clients/scored", scored(record)
    yield "attack/success", record.get("attack", {}).get("success")
    for name, values in errors_over_weights([record]).items():
        yield f"aggregation/{name}", statistics.fmean(values)
    for direction in DIRECTIONS:
        kinds = record.get("bytes", {}).get(direction, {})
        yield from ((f"bytes_{direction}/{kind}", size) for kind, size in kinds.items())
        yield f"bytes_{direction}/total", sum(kinds.values())
    yield from ((f"seconds/{name}", value) for name, value in record.get("seconds", {}).items())
    yield "privacy/epsilon", record.get("privacy", {}).get("epsilon")
    yield from ((f"faults/{name}", len(record[name])) for name in FAULTS if record.get(name))


def errors_over_weights(records: Iterable[RoundRecord]) -> dict[str, list[float]]:
    """Error -> its values over all adapted weights and rounds; notes of a method included."""
    found: dict[str, list[float]] = {}
    for row in (row for record in records for row in record.get("weights", {}).values()):
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A nested table with dotted keys: ``training.learning_rate``."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return found
