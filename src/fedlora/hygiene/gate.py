"""One round's uploads at the server's door: each is let in, or quarantined with the reason.

What a gate has to know of the rounds before is ``conduct``, a plain JSON-able table of the standing: ``strikes``
(client -> rounds in which it was quarantined) and ``seen`` (client -> digest of the last upload that was let in).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from fedlora.forms import RefusedError, checked
from fedlora.hygiene.limits import ENOUGH, Hygiene
from fedlora.hygiene.sizes import Sizes, sizes
from fedlora.rounds import Received, Rules
from fedlora.types import Tree

STRIKES, SEEN = "strikes", "seen"
SAMPLE = 64  # numbers of a leaf that its digest is of: two clients that trained differ in every one of them
SIDES = ("input", "output")
UNMOVED = 0.5  # a factor that moved by less than this share of what was served wrecks no mean


class Bad(NamedTuple):
    """An upload that was quarantined."""

    reason: str
    tree: Tree


def barred(limits: Hygiene, conduct: Mapping[str, Mapping[str, Any]]) -> frozenset[int]:
    """The clients that have been quarantined too often, and take part no more."""
    strikes = conduct.get(STRIKES, {})
    return frozenset(int(client) for client, times in strikes.items() if 0 < limits.strikes <= times)


@dataclass
class Gate:
    """Of one round; ``shared`` is what its cohort was served."""

    limits: Hygiene
    rules: Rules
    shared: Tree
    conduct: dict[str, dict[str, Any]]
    alone: bool = False  # no upload may decide about another: under client-level privacy one would show in the others
    bad: dict[int, Bad] = field(default_factory=dict)
    sizes: dict[int, Sizes] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)

    def arrived(self, upload: Received) -> Received | None:
        """What can be said of an upload by itself: the upload as the server has it, or None where it is bad."""
        client = upload.turn.client
        try:
            found = checked(self.rules, self.shared, upload.turn, upload.tree)
            self.sizes[client] = sizes(self.rules, found)
            self.digests[client] = digest(found.tree) if any(self.sizes[client].updates.values()) else ""
            self._own(client)
        except RefusedError as error:
            self.refuse(upload, str(error))
            return None
        self.bad.pop(client, None)  # it was asked once more, and this one is sound
        return upload._replace(tree=found.tree)

    def refuse(self, upload: Received, reason: str) -> None:
        """Quarantines an upload."""
        client = upload.turn.client
        self.bad[client] = Bad(reason, upload.tree)
        self.sizes.pop(client, None)
        self.digests.pop(client, None)

    def judged(self, uploads: Sequence[Received], steps: Callable[[Received], int]) -> list[Received]:
        """The round as a whole: those that are not absurd beside the others, their claims capped.

        ``steps`` are the optimiser steps that a client was to do: who does more may have moved farther.
        """
        there = [u for u in uploads if u.turn.client in self.sizes]
        work = {u.turn.client: steps(u) for u in there}
        for client, reason in ({} if self.alone else outliers(self.limits, self.sizes, work)).items():
            self.refuse(next(u for u in there if u.turn.client == client), reason)
        good = [u for u in uploads if u.turn.client not in self.bad]
        claims = self.limits.capped([u.examples for u in good])
        return [u if u.examples == claim else u._replace(examples=claim) for u, claim in zip(good, claims)]

    def settle(self) -> None:
        """Writes the round into the record of conduct."""
        strikes, seen = self.conduct.setdefault(STRIKES, {}), self.conduct.setdefault(SEEN, {})
        for client in sorted(self.bad):
            strikes[str(client)] = strikes.get(str(client), 0) + 1
        seen.update({str(client): found for client, found in sorted(self.digests.items()) if found})

    def _own(self, client: int) -> None:
        """``RefusedError`` where the upload is another client's, of this round or of its last one."""
        own = self.digests[client]
        if not own or self.alone:
            return
        for other, found in self.conduct.get(SEEN, {}).items():
            if found == own and other != str(client):
                raise RefusedError(f"it sent what client {other} had sent before")


def digest(tree: Tree) -> str:
    """Of some numbers of every leaf, in one order for all; empty where nothing was sent."""
    found = hashlib.blake2b(digest_size=12)
    some = False
    for part in sorted(tree):
        for _, x in sorted(tree[part].items()):
            flat, some = x.detach().reshape(-1), True
            found.update(flat[:: max(1, len(flat) // SAMPLE)].float().cpu().numpy().tobytes())
    return found.hexdigest() if some else ""


def outliers(limits: Hygiene, found: Mapping[int, Sizes], steps: Mapping[int, int]) -> dict[int, str]:
    """The clients whose sizes are beyond the limits, and why. With fewer than three uploads there is no median."""
    if len(found) < ENOUGH:
        return {}
    usual = median(steps.values())
    more = {client: max(1.0, steps[client] / usual) for client in found}
    norms = {client: sum(one.updates.values()) ** 0.5 for client, one in found.items()}
    middle = median(norms.values())
    bad: dict[int, str] = {}
    for client, norm in norms.items():
        if middle > 0 and norm > limits.norm_limit * middle * more[client]:
            times = f"{norm / middle:.3g}"
            bad[client] = f"its update's norm is {times} times the round's median, above hygiene.norm_limit"
    explained = {k: max(more[k], norms[k] / middle) if middle > 0 else more[k] for k in found}
    for side in (0, 1):
        for client, times in _factors(limits, found, explained, side).items():
            bad.setdefault(
                client,
                f"its {SIDES[side]} factors moved {times:.3g} times as far as the median's, and its update did not: "
                "the pair is rescaled or turned (hygiene.factor_limit)",
            )
    return bad


def _factors(
    limits: Hygiene, found: Mapping[int, Sizes], explained: Mapping[int, float], side: int
) -> dict[int, float]:
    """Client -> by how much its factors of one side moved too far, over all weights or in one of them."""
    bad: dict[int, float] = {}
    parts = sorted(set.intersection(*(set(one.sides) for one in found.values())))
    for some, limit in [(parts, limits.factor_limit), *(([part], limits.norm_limit) for part in parts)]:
        away = {k: sum(one.sides[p][side] for p in some) ** 0.5 for k, one in found.items()}
        middle = median(away.values())
        for client, far in away.items():
            served = sum(found[client].served[p][side] for p in some) ** 0.5
            if middle > 0 and far > max(limit * middle * explained[client], UNMOVED * served):
                bad.setdefault(client, far / middle)
    return bad
