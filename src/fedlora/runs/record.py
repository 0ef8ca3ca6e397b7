"""A round's record as named numbers, for trackers, data frames and live views.

The names are stable: ``docs/trackers.md`` lists them, and a test checks them.
"""

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Literal

from fedlora.engines.record import Direction, RoundRecord
from fedlora.runs.attendance import count_scored_clients

CLIENTS: tuple[Literal["mean", "examples_mean", "worst", "spread"], ...] = ("mean", "examples_mean", "worst", "spread")
FAULTS: tuple[Literal["absent", "unscored", "quarantined", "stragglers"], ...] = (
    "absent", "unscored", "quarantined", "stragglers",
)  # fmt: skip
DIRECTIONS: tuple[Direction, ...] = ("up", "down")


def round_figures(record: RoundRecord) -> dict[str, float]:
    """Return all figures of a record by name, without those that are missing or not finite.

    ``aggregation/`` are means over the adapted weights, ``bytes_up/`` and ``bytes_down/`` sums over the clients.
    """
    return {name: float(value) for name, value in _figures(record) if value is not None and math.isfinite(value)}


def _figures(record: RoundRecord) -> Iterator[tuple[str, float | None]]:
    losses = [loss for loss in record.get("loss", {}).values() if loss is not None]
    if losses:
        yield "train/loss", statistics.fmean(losses)
    yield "train/clients", len(record.get("cohort", ()))
    for name, value in record.get("global", {}).items():
        yield f"global/{name}", value
    for name in CLIENTS:
        yield f"clients/{name}", record.get("clients", {}).get(name)
    if record.get("clients", {}).get("each"):
        yield "clients/scored", count_scored_clients(record)
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
    """Return each aggregation error's values over all adapted weights and rounds."""
    errors: dict[str, list[float]] = {}
    for weight in (weight for record in records for weight in record.get("weights", {}).values()):
        for name, value in weight.items():
            errors.setdefault(name, []).append(value)
    return errors
