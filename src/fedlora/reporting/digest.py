"""A round's record as one flat row, and what is summed over rounds: a run is read line by line and never held whole."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import FAULT_TEXTS, client_faults, count_scored, describe_means
from fedlora.text import display_safe

BINS = 40  # columns of a heat map over rounds
FAULTS = 2000  # of a run that are kept in words; all are counted
ERRORS = ("served", "fedit", "best")
BY_ROUND = (*ERRORS, "drift", "cosine A", "cosine B")
PHASES = ("train", "combine", "measure", "evaluate")
TEXT = 200  # characters of a reason


def number(value: Any) -> float | None:
    """A finite number, or None: JSON has no other, and neither has a figure."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


@dataclass
class Digest:
    """What a report needs of a run's rounds.

    ``rounds`` has a row a round; ``layers`` the mean served error, part -> bin -> (sum, count), a bin being one of at
    most ``BINS`` equal stretches of ``asked`` rounds; ``each`` the clients' figures of the last evaluated round.
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
    new: int = 0  # of the clients, the last ones, that never take part and are never scored

    def take(self, record: RoundRecord) -> None:
        """One more round."""
        row: dict[str, Any] = {
            "round": int(record["round"]),
            **self._sent(record),
            **self._spent(record),
            **self._scores(record),
        }
        losses = [x for value in record.get("loss", {}).values() if (x := number(value)) is not None]
        row["loss"] = fmean(losses) if losses else None
        row["epsilon"] = number(record.get("privacy", {}).get("epsilon"))
        row["delta"] = number(record.get("privacy", {}).get("delta"))
        row |= self._weights(row["round"], record.get("weights", {}))
        methods = record.get("oracle", {}).get("methods", {})
        row["oracle"] = {display_safe(name, 60): number(found.get("error")) for name, found in methods.items()}
        for fault in _faults(record):
            self.counted[fault["kind"]] = self.counted.get(fault["kind"], 0) + 1
            if len(self.faults) < FAULTS:
                self.faults.append(fault)
        self.rounds.append(row)

    def _scores(self, record: RoundRecord) -> dict[str, float | None]:
        clients = record.get("clients", {})
        if clients:
            self.each = [number(value) for value in clients.get("each", [])]
            self.worst = clients.get("worst_client")
        found = {key: number(clients.get(key)) for key in ("mean", "worst")}
        found["scored"] = count_scored(record) if clients else None
        return {"global": number(record.get("global", {}).get(self.metric)), "clients": found["mean"], **found}

    @property
    def of(self) -> int:
        """How many clients there are to score; 0 before a round was evaluated."""
        return max(0, len(self.each) - self.new)

    @property
    def means(self) -> str:
        """In which rounds the mean over clients is over fewer than all, in words; empty where in none."""
        return describe_means(
            [(row["round"], row["scored"]) for row in self.rounds if row["scored"] is not None], self.of
        )

    def _sent(self, record: RoundRecord) -> dict[str, float]:
        for direction, parts in record.get("bytes", {}).items():
            for part, size in parts.items():
                self.bytes[direction, part] = self.bytes.get((direction, part), 0.0) + size / 1e6
                self.megabytes += size / 1e6
        return {"mb": self.megabytes}

    def _spent(self, record: RoundRecord) -> dict[str, float]:
        found = record.get("seconds", {})
        known = {phase: found[phase] for phase in PHASES if phase in found}
        total = found.get("total", sum(known.values()))
        for phase, seconds in {**known, "rest": max(0.0, total - sum(known.values()))}.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        self.seconds += total
        return {"seconds": self.seconds}

    def _weights(self, round: int, weights: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        for part, figures in weights.items():
            value = number(figures.get("served"))
            if value is not None:
                own = self.layers.setdefault(display_safe(part, TEXT), {})
                place = self.bin(round)
                total, count = own.get(place, (0.0, 0))
                own[place] = (total + value, count + 1)
        means: dict[str, float | None] = {}
        for name in BY_ROUND:
            found = [x for figures in weights.values() if (x := number(figures.get(name))) is not None]
            means[name] = fmean(found) if found else None
        return means

    @property
    def width(self) -> int:
        """Rounds in a stretch of ``layers``."""
        return max(1, math.ceil(self.asked / BINS))

    def bin(self, round: int) -> int:
        """The first round of the stretch that a round, from 1, lies in."""
        return (round - 1) // self.width * self.width + 1


def _faults(record: RoundRecord) -> Iterator[dict[str, Any]]:
    """Quarantined uploads, clients that were away, and scores that did not come, with the reason."""
    for kind, client, reason in client_faults(record):
        yield _fault(record, client, FAULT_TEXTS[kind], reason)
    for client in record.get("stragglers", ()):
        yield _fault(record, client, "straggler", "did a part of its steps (clients.stragglers)")


def _fault(record: RoundRecord, client: object, kind: str, why: object) -> dict[str, Any]:
    return {
        "round": int(record["round"]),
        "client": display_safe(client, 60),
        "kind": kind,
        "reason": display_safe(why, TEXT),
    }
