"""Who is behind a run's figures: how many clients were scored, who was away and when, whose uploads were left out."""

from collections.abc import Mapping
from typing import Any

from fedlora.limits import shown

KINDS = {"absent": "away", "unscored": "not scored", "quarantined": "quarantined"}
ROUNDS, REASON = 12, 120  # rounds that are listed, characters of a reason


def over(summary: Mapping[str, Any]) -> str:
    """Whom a mean over clients is over, for a title: ``clients``, or ``2 of 3 clients``."""
    each = summary.get("final", {}).get("clients", {}).get("each", [])
    scored = sum(value is not None for value in each)
    return "clients" if scored == len(each) else f"{scored} of {len(each)} clients"


def whole(summary: Mapping[str, Any]) -> bool:
    """Whether every client was scored in the final figures, and none was away or left out before."""
    return over(summary) == "clients" and not any(summary.get(kind) for kind in KINDS)


def lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line a client and kind: ``client 2, away in round`` and ``3, 4, 5: its node is not connected``."""
    found = []
    for kind, word in KINDS.items():
        for client, rounds in summary.get(kind, {}).items():
            why = ", ".join(dict.fromkeys(shown(text, REASON) for text in rounds.values()))
            listed = ", ".join(list(rounds)[:ROUNDS]) + (
                f" and {len(rounds) - ROUNDS} more" if len(rounds) > ROUNDS else ""
            )
            found.append((f"client {shown(client, 60)}, {word} in round", f"{listed}: {why}"))
    return found
