"""Faults of clients in the records of a run: absent clients, missing scores and quarantined uploads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from fedlora.engines.record import Fault, RoundRecord
from fedlora.text import display_safe

FAULT_TEXTS: Mapping[Fault, str] = {"absent": "absent", "unscored": "not scored", "quarantined": "quarantined"}
NAME, REASON = 60, 120  # characters of a client's name and of a reason
ROUNDS, STRETCHES, CLIENTS = 12, 4, 6  # rounds in a list, stretches of rounds and clients in a sentence

Faults = dict[str, dict[str, dict[str, str]]]  # "absent", "unscored" or "quarantined" -> client -> round -> reason


def client_faults(record: RoundRecord) -> Iterator[tuple[Fault, Any, str]]:
    """Yield each fault of a round: its kind, the client and the reason."""
    for kind in FAULT_TEXTS:
        for client, reason in record.get(kind, {}).items():
            yield kind, client, reason


def collect_faults(records: Iterable[RoundRecord], faults: Faults | None = None) -> Faults:
    """Return the faults of all rounds, added to ``faults``."""
    faults = {} if faults is None else faults
    for record in records:
        for kind, client, reason in client_faults(record):
            faults.setdefault(kind, {}).setdefault(str(client), {})[str(record["round"])] = reason
    return faults


def count_scored_clients(record: RoundRecord) -> int:
    """Return the number of clients whose own models were scored in a round."""
    return sum(value is not None for value in record.get("clients", {}).get("each", ()))


def describe_scored_clients(summary: Mapping[str, Any]) -> str:
    """Return the clients that the final mean is over: ``clients`` for all, or ``2 of 3 clients``."""
    each = summary.get("final", {}).get("clients", {}).get("each", [])
    scored = summary.get("scored") or {"clients": count_scored_clients(summary.get("final", {})), "of": len(each)}
    return "clients" if scored["clients"] == scored["of"] else f"{scored['clients']} of {scored['of']} clients"


def is_complete(summary: Mapping[str, Any]) -> bool:
    """Whether every client was scored in the final round, and no round has a fault."""
    return describe_scored_clients(summary) == "clients" and not any(summary.get(kind) for kind in FAULT_TEXTS)


def fault_lines(faults: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a line for each client and kind: ``client 2, absent in round`` and ``3, 4, 5: its node is gone``."""
    lines = []
    for kind, text in FAULT_TEXTS.items():
        for client, rounds in faults.get(kind, {}).items():
            reasons = ", ".join(dict.fromkeys(display_safe(reason, REASON) for reason in rounds.values()))
            more = f" and {len(rounds) - ROUNDS} more" if len(rounds) > ROUNDS else ""
            numbers = ", ".join(list(rounds)[:ROUNDS]) + more
            lines.append((f"client {display_safe(client, NAME)}, {text} in round", f"{numbers}: {reasons}"))
    return lines


def describe_means(rounds: Iterable[tuple[int, int]], total: int) -> str:
    """Return the rounds whose mean is over fewer than all clients: ``mean over 2 of 3 clients in rounds 3–5``.

    ``rounds`` has the number of each evaluated round and how many clients were scored in it. The text is empty if every
    mean is over all clients. Many stretches of rounds are summed up in one sentence.
    """
    pairs = list(rounds)
    stretches = [(count, [number for number, _ in pair]) for count, pair in groupby(pairs, lambda pair: pair[1])]
    few = [(count, numbers) for count, numbers in stretches if count < total]
    if not few:
        return ""
    if len(few) <= STRETCHES:
        return ", ".join(f"mean over {count} of {total} clients in {_name_rounds(numbers)}" for count, numbers in few)
    least, part, evaluated = min(count for count, _ in few), sum(len(numbers) for _, numbers in few), len(pairs)
    return f"mean over {least} to {total} of {total} clients, fewer than all in {part} of {evaluated} evaluated rounds"


def _name_rounds(numbers: Sequence[int]) -> str:
    return f"round {numbers[0]}" if len(numbers) == 1 else f"rounds {numbers[0]}–{numbers[-1]}"


def name_faults(record: RoundRecord) -> str:
    """Return a round's faults by client: ``client 2 absent and not scored, client 0 quarantined``."""
    by_client: dict[str, list[str]] = {}
    for kind, client, _ in client_faults(record):
        by_client.setdefault(display_safe(client, NAME), []).append(FAULT_TEXTS[kind])
    texts = [f"client {client} {' and '.join(kinds)}" for client, kinds in list(by_client.items())[:CLIENTS]]
    return ", ".join(texts + ([f"{len(by_client) - CLIENTS} more clients"] if len(by_client) > CLIENTS else []))


@dataclass
class Attendance:
    """The faults of a run, from its records one by one; holds no record."""

    total: int  # clients that take part
    evaluated: list[tuple[int, int]] = field(default_factory=list)  # round, number of clients that were scored
    faults: Faults = field(default_factory=dict)

    def add(self, record: RoundRecord) -> None:
        """Add a round."""
        collect_faults([record], self.faults)
        if "clients" in record:
            self.evaluated.append((int(record["round"]), count_scored_clients(record)))

    @property
    def text(self) -> str:
        """The rounds with means over fewer clients, then a line for each client and kind; empty without faults."""
        means = describe_means(self.evaluated, self.total)
        return "\n".join([means] * bool(means) + [f"{who} {when}" for who, when in fault_lines(self.faults)])
