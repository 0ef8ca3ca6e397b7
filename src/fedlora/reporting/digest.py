"""Flat rows of a run's rounds and sums over them, gathered record by record, so a run is never in memory whole."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import FAULT_TEXTS, client_faults, count_scored_clients, describe_means
from fedlora.text import display_safe

BINS = 40  # columns of a heat map over rounds
FAULTS = 2000  # of a run that are kept as text; all are counted
ERRORS = ("served", "fedit", "best")
BY_ROUND = (*ERRORS, "drift", "cosine A", "cosine B")
PHASES = ("train", "combine", "measure", "evaluate")
TEXT = 200  # characters of a reason


def to_finite(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else, which neither JSON nor a figure can hold."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


@dataclass
class Digest:
    """The contents of a run's records that a report needs.

    ``rounds`` has a row for each round. ``layers`` has the served error, part -> bin -> (sum, count), where a bin is
    one of at most ``BINS`` equal stretches of ``asked`` rounds. ``each`` has the clients' figures of the last
    evaluated round.
    """

    asked: int
    metric: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    counted: dict[str, int] = field(default_factory=dict)  # kind of fault -> how many, all of them
    each: list[float | None] = field(default_factory=list)
    worst: int | None = None
    megabytes: float = 0.0
    seconds: float = 0.0
    bytes: dict[tuple[str, str], float] = field(default_factory=dict)  # direction, part -> megabytes
    phases: dict[str, float] = field(default_factory=dict)
    new: int = 0  # number of clients, the last ones, that never take part and are never scored

    def take(self, record: RoundRecord) -> None:
        """Add a round."""
        for direction, parts in record.get("bytes", {}).items():
            for part, size in parts.items():
                self.bytes[direction, part] = self.bytes.get((direction, part), 0.0) + size / 1e6
                self.megabytes += size / 1e6
        times = record.get("seconds", {})
        known = {phase: times[phase] for phase in PHASES if phase in times}
        total = times.get("total", sum(known.values()))
        for phase, seconds in {**known, "rest": max(0.0, total - sum(known.values()))}.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        self.seconds += total
        row: dict[str, Any] = {"round": int(record["round"]), "mb": self.megabytes, "seconds": self.seconds}
        row |= self._add_scores(record)
        losses = [x for value in record.get("loss", {}).values() if (x := to_finite(value)) is not None]
        row["loss"] = fmean(losses) if losses else None
        row["epsilon"] = to_finite(record.get("privacy", {}).get("epsilon"))
        row["delta"] = to_finite(record.get("privacy", {}).get("delta"))
        row |= self._add_weights(row["round"], record.get("weights", {}))
        methods = record.get("oracle", {}).get("methods", {})
        row["oracle"] = {display_safe(name, 60): to_finite(found.get("error")) for name, found in methods.items()}
        for fault in _list_faults(record):
            self.counted[fault["kind"]] = self.counted.get(fault["kind"], 0) + 1
            if len(self.faults) < FAULTS:
                self.faults.append(fault)
        self.rounds.append(row)

    def _add_scores(self, record: RoundRecord) -> dict[str, float | None]:
        clients = record.get("clients", {})
        if clients:
            self.each = [to_finite(value) for value in clients.get("each", [])]
            self.worst = clients.get("worst_client")
        return {
            "global": to_finite(record.get("global", {}).get(self.metric)), "clients": to_finite(clients.get("mean")),
            "worst": to_finite(clients.get("worst")), "scored": count_scored_clients(record) if clients else None,
        }  # fmt: skip

    @property
    def of(self) -> int:
        """The number of clients to score; 0 before a round was evaluated."""
        return max(0, len(self.each) - self.new)

    @property
    def means(self) -> str:
        """A text about the rounds whose mean over clients is over fewer than all; empty if there are none."""
        return describe_means(
            [(row["round"], row["scored"]) for row in self.rounds if row["scored"] is not None], self.of
        )

    def _add_weights(self, round: int, weights: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        for part, figures in weights.items():
            value = to_finite(figures.get("served"))
            if value is not None:
                bins = self.layers.setdefault(display_safe(part, TEXT), {})
                first = (round - 1) // self.width * self.width + 1
                total, count = bins.get(first, (0.0, 0))
                bins[first] = (total + value, count + 1)
        means: dict[str, float | None] = {}
        for name in BY_ROUND:
            values = [x for figures in weights.values() if (x := to_finite(figures.get(name))) is not None]
            means[name] = fmean(values) if values else None
        return means

    @property
    def width(self) -> int:
        """The number of rounds in a bin of ``layers``."""
        return max(1, math.ceil(self.asked / BINS))


def _list_faults(record: RoundRecord) -> Iterator[dict[str, Any]]:
    """Yield quarantined uploads, absent clients, missing scores and stragglers, with the reasons."""
    first = sorted(client_faults(record), key=lambda fault: fault[0] != "quarantined")
    faults = [(FAULT_TEXTS[kind], client, reason) for kind, client, reason in first]
    late = "did a part of its steps (clients.stragglers)"
    faults += [("straggler", client, late) for client in record.get("stragglers", ())]
    for kind, client, reason in faults:
        yield {"round": int(record["round"]), "client": display_safe(client, 60), "kind": kind,
               "reason": display_safe(reason, TEXT)}  # fmt: skip
