"""One round's uploads at the server's door: each is let in, or quarantined with the reason.

What a gate has to know of the rounds before is ``conduct``, a plain JSON-able table of the standing: ``strikes``
(client -> rounds in which it was quarantined) and ``seen`` (client -> digest of the last upload that was let in).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedlora.rounds import Received, Rules
from fedlora.security.validation.expected import Checked, Expectations, Expected, RefusedError, checked
from fedlora.security.validation.settings import ENOUGH, Hygiene
from fedlora.security.validation.sizes import Moved, Origin, moved, norm, served
from fedlora.types import Tree

STRIKES, SEEN = "strikes", "seen"
SIDES = ("input", "output")
RESTLESS = 2.0
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
    away: dict[int, Moved] = field(default_factory=dict)
    starts: dict[int, Checked] = field(default_factory=dict)  # without the upload itself, which may be kept on disk
    wanted: Expectations = field(init=False, repr=False)
    origins: WeakKeyDictionary[Expected, Origin] = field(default_factory=WeakKeyDictionary, repr=False)

    def __post_init__(self) -> None:
        self.wanted = Expectations(self.rules, self.shared)

    def arrived(self, upload: Received) -> Received | None:
        """What can be said of an upload by itself: the upload as the server has it, or None where it is bad."""
        client = upload.turn.client
        try:
            wanted = self.wanted.of(upload.turn)
            found = checked(self.rules, upload.turn, upload.tree, wanted)
            self.away[client] = moved(found, self._origin(wanted, found))
            self.starts[client] = found._replace(tree={})
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
        self.away.pop(client, None)

    def judged(self, uploads: Sequence[Received], steps: Callable[[Received], int]) -> list[Received]:
        """The round as a whole: those that are not absurd beside the others, their claims capped.

        ``steps`` are the optimiser steps that a client was to do: who does more may have moved farther.
        """
        there = {u.turn.client: u for u in uploads if u.turn.client in self.away}
        if len(there) >= ENOUGH and not self.alone:
            work = {client: steps(upload) for client, upload in there.items()}
            for client, reason in self._outliers(there, work).items():
                self.refuse(there[client], reason)
        good = [u for u in uploads if u.turn.client not in self.bad]
        claims = self.limits.capped([u.examples for u in good])
        return [u if u.examples == claim else u._replace(examples=claim) for u, claim in zip(good, claims)]

    def settle(self) -> None:
        """Writes the round into the record of conduct."""
        strikes, seen = self.conduct.setdefault(STRIKES, {}), self.conduct.setdefault(SEEN, {})
        for client in sorted(self.bad):
            strikes[str(client)] = strikes.get(str(client), 0) + 1
        seen.update({str(client): away.digest for client, away in sorted(self.away.items()) if away.digest})

    def _origin(self, wanted: Expected, found: Checked) -> Origin:
        """Made once for all uploads that have just what was wanted."""
        if found.start is not wanted.start:
            return Origin(self.rules, found)
        if wanted not in self.origins:
            self.origins[wanted] = Origin(self.rules, found)
        return self.origins[wanted]

    def _own(self, client: int) -> None:
        """``RefusedError`` where the upload is what another client sent in its last round."""
        own = self.away[client].digest
        if self.alone:
            return
        for other, found in self.conduct.get(SEEN, {}).items():
            if own and found == own and other != str(client):
                raise RefusedError(f"it sent what client {other} had sent before")

    def _outliers(self, there: Mapping[int, Received], work: Mapping[int, int]) -> dict[int, str]:
        """The clients that are absurd beside the others, and why.

        Norms of products are taken only where some client's factors moved more than ``RESTLESS`` medians: where all
        moved about as far, no product is many times another.
        """
        usual = median(work.values())
        more = {client: max(1.0, work[client] / usual) for client in there}
        if not self._restless(list(there), torch.tensor(list(more.values()), dtype=torch.float64)):
            return {}
        limits, bad = self.limits, dict[int, str]()
        norms = {k: norm(self.rules, self.starts[k].start, self.starts[k].products, u.tree, self.away[k])
                 for k, u in there.items()}  # fmt: skip
        middle = median(norms.values())
        for client, size in norms.items():
            if middle > 0 and size > limits.norm_limit * middle * more[client]:
                times = f"{size / middle:.3g}"
                bad[client] = f"its update's norm is {times} times the round's median, above hygiene.norm_limit"
        explained = {k: max(more[k], norms[k] / middle) if middle > 0 else more[k] for k in there}
        for side in (0, 1):
            for client, far in self._factors(explained, side).items():
                bad.setdefault(
                    client,
                    f"its {SIDES[side]} factors moved {far:.3g} times as far as the median's, and its update did not: "
                    "the pair is rescaled or turned (hygiene.factor_limit)",
                )
        return bad

    def _restless(self, clients: Sequence[int], more: Tensor) -> bool:
        """Whether some client moved much farther than the median: on one side of the pairs, in all other leaves, or in
        one weight alone."""
        known = [self.away[client] for client in clients]
        parts = sorted(set.intersection(*(set(one.sides) for one in known)))
        sides = torch.tensor([[one.sides[p] for p in parts] for one in known], dtype=torch.float64)
        sides = sides.reshape(len(known), len(parts), 2).sqrt()
        others = [sum(x for part, x in one.leaves.items() if part not in one.sides) ** 0.5 for one in known]
        whole = torch.cat([sides.square().sum(1).sqrt(), torch.tensor(others, dtype=torch.float64)[:, None]], dim=1)
        if bool((whole > RESTLESS * _middle(whole)).any()):
            return True
        weights = sides.flatten(1)
        return bool((weights > self.limits.norm_limit * more[:, None] * _middle(weights)).any())

    def _factors(self, explained: Mapping[int, float], side: int) -> dict[int, float]:
        """Client -> by how much its factors of one side moved too far, over all weights or in one of them."""
        bad: dict[int, float] = {}
        parts = sorted(set.intersection(*(set(self.away[client].sides) for client in explained)))
        whole = [(parts, self.limits.factor_limit)] if parts else []
        for some, limit in [*whole, *(([part], self.limits.norm_limit) for part in parts)]:
            away = {k: sum(self.away[k].sides[p][side] for p in some) ** 0.5 for k in explained}
            middle = median(away.values())
            suspects = [k for k, far in away.items() if middle > 0 and far > limit * middle * explained[k]]
            for client in suspects:
                if away[client] > UNMOVED * served(self.rules, self.starts[client].start, some, side):
                    bad.setdefault(client, away[client] / middle)
        return bad


def _middle(x: Tensor) -> Tensor:
    """Medians of the columns; ``quantile`` takes several times as long for so few."""
    many = len(x)
    return x.sort(dim=0).values[(many - 1) // 2 : many // 2 + 1].mean(0)
