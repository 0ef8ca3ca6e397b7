"""Who is behind a run's figures: how many clients were scored, who was away and when, whose uploads were left out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from fedlora.engines.record import Fault, RoundRecord
from fedlora.text import display_safe

KINDS: Mapping[Fault, str] = {"absent": "away", "unscored": "not scored", "quarantined": "quarantined"}
ROUNDS, REASON = 12, 120  # rounds that are listed, characters of a reason
STRETCHES, CLIENTS = 4, 6  # stretches of rounds and clients that are named in a sentence

LeftOut = dict[str, dict[str, dict[str, str]]]  # "quarantined", "absent" or "unscored" -> client -> round -> why


def left_out(records: Iterable[RoundRecord], before: LeftOut | None = None) -> LeftOut:
    """Who was left out of a whole run, for its summary. ``before`` is taken over and has these rounds added."""
    found: LeftOut = {} if before is None else before
    for record in records:
        for kind in KINDS:
            for client, reason in record.get(kind, {}).items():
                found.setdefault(kind, {}).setdefault(str(client), {})[str(record["round"])] = reason
    return found


def scored(record: RoundRecord) -> int:
    """How many clients a round's figures of the clients' own models are over."""
    return sum(value is not None for value in record.get("clients", {}).get("each", ()))


def over(summary: Mapping[str, Any]) -> str:
    """Whom a mean over clients is over, for a title: ``clients``, or ``2 of 3 clients``."""
    each = summary.get("final", {}).get("clients", {}).get("each", [])
    found = summary.get("scored") or {"clients": scored(summary.get("final", {})), "of": len(each)}
    return "clients" if found["clients"] == found["of"] else of_all(found["clients"], found["of"])


def of_all(scored: int, of: int) -> str:
    """``2 of 3 clients``."""
    return f"{scored} of {of} clients"


def fewest(summary: Mapping[str, Any]) -> str:
    """What to say beside a mean over the last rounds: nothing, or ``, of at least 2 of 3 clients``."""
    least, of = summary.get("last_rounds", {}).get("fewest"), summary.get("scored", {}).get("of")
    return "" if least in (None, of) else f", of at least {least} of {of} clients"


def whole(summary: Mapping[str, Any]) -> bool:
    """Whether every client was scored in the final figures, and none was away or left out before."""
    return over(summary) == "clients" and not any(summary.get(kind) for kind in KINDS)


def lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line a client and kind: ``client 2, away in round`` and ``3, 4, 5: its node is not connected``."""
    found = []
    for kind, word in KINDS.items():
        for client, rounds in summary.get(kind, {}).items():
            why = ", ".join(dict.fromkeys(display_safe(text, REASON) for text in rounds.values()))
            listed = ", ".join(list(rounds)[:ROUNDS]) + (
                f" and {len(rounds) - ROUNDS} more" if len(rounds) > ROUNDS else ""
            )
            found.append((f"client {display_safe(client, 60)}, {word} in round", f"{listed}: {why}"))
    return found


def over_seeds(summaries: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """The same of several seeds: ``over``, whose figures are not over all clients, and ``missing``, where there are."""
    few = [f"seed {seed}: {who}" for seed, found in summaries if (who := over(found)) != "clients"]
    missing = [f"seed {seed}, {who} {when}" for seed, found in summaries for who, when in lines(found)]
    return {key: value for key, value in (("over", few), ("missing", missing)) if value}


def means(rounds: Iterable[tuple[int, int]], of: int) -> str:
    """Of evaluated rounds with how many clients were scored: ``mean over 2 of 3 clients in rounds 3–5``.

    Empty where every mean is over all clients. Many stretches of rounds become one sentence with the least number.
    """
    pairs = list(rounds)
    runs = [(many, [number for number, _ in own]) for many, own in groupby(pairs, lambda pair: pair[1])]
    few = [(many, own) for many, own in runs if many < of]
    if not few:
        return ""
    if len(few) <= STRETCHES:
        return ", ".join(f"mean over {many} of {of} clients in {_stretch(own)}" for many, own in few)
    count, least = sum(len(own) for _, own in few), min(many for many, _ in few)
    return f"mean over {least} to {of} of {of} clients, fewer than all in {count} of {len(pairs)} evaluated rounds"


def _stretch(rounds: Sequence[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}–{rounds[-1]}"


def by_name(record: RoundRecord) -> str:
    """Who is missing from a round, for a line of a log: ``client 2 away and not scored, client 0 quarantined``."""
    found: dict[str, list[str]] = {}
    for kind, word in KINDS.items():
        for client in record.get(kind, {}):
            found.setdefault(display_safe(client, 60), []).append(word)
    named = [f"client {client} {' and '.join(words)}" for client, words in list(found.items())[:CLIENTS]]
    return ", ".join([*named, *([f"{len(found) - CLIENTS} more clients"] if len(found) > CLIENTS else [])])


@dataclass
class Attendance:
    """Gathers it from a run's records one by one, and holds none of them."""

    of: int  # clients that take part
    evaluated: list[tuple[int, int]] = field(default_factory=list)  # round, clients that were scored
    missing: LeftOut = field(default_factory=dict)

    def take(self, record: RoundRecord) -> None:
        """One more round."""
        left_out([record], self.missing)
        if "clients" in record:
            self.evaluated.append((int(record["round"]), scored(record)))

    @property
    def means(self) -> str:
        """In which rounds the mean over clients is over fewer than all, in words; empty where in none."""
        return means(self.evaluated, self.of)

    @property
    def text(self) -> str:
        """Whom the means are over, then a line a client and kind; empty where nobody was missing."""
        said = self.means
        return "\n".join(([said] if said else []) + [f"{who} {when}" for who, when in lines(self.missing)])
