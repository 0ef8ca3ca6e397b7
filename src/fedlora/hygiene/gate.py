"""One round's uploads at the server's door: each is let in, or quarantined with the reason.

What a gate has to know of the rounds before is ``conduct``, a plain JSON-able table of the standing: ``strikes``
(client -> rounds in which it was quarantined) and ``seen`` (client -> digest of the last upload that was let in).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora.forms import Checked, Expectations, RefusedError, checked
from fedlora.hygiene.limits import ENOUGH, Hygiene
from fedlora.hygiene.sizes import Moved, moved, norm, served
from fedlora.rounds import Received, Rules
from fedlora.types import Tree

STRIKES, SEEN = "strikes", "seen"
LEAVES, SAMPLE = 4, 64  # of an upload, and numbers of each, that its digest is of: who trained differs in all of them
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
    digests: dict[int, str] = field(default_factory=dict)
    wanted: Expectations = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.wanted = Expectations(self.rules, self.shared)

    def arrived(self, upload: Received) -> Received | None:
        """What can be said of an upload by itself: the upload as the server has it, or None where it is bad."""
        client = upload.turn.client
        try:
            found = checked(self.rules, upload.turn, upload.tree, self.wanted.of(upload.turn))
            self.away[client] = moved(self.rules, found)
            self.starts[client] = found._replace(tree={})
            self.digests[client] = digest(found.tree) if any(self.away[client].leaves.values()) else ""
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
        self.digests.pop(client, None)

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
        seen.update({str(client): found for client, found in sorted(self.digests.items()) if found})

    def _own(self, client: int) -> None:
        """``RefusedError`` where the upload is what another client sent in its last round."""
        own = self.digests[client]
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
        if bool((whole > RESTLESS * whole.quantile(0.5, dim=0)).any()):
            return True
        weights = sides.flatten(1)
        return bool(parts) and bool(
            (weights > self.limits.norm_limit * more[:, None] * weights.quantile(0.5, dim=0)).any()
        )

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


def digest(tree: Tree) -> str:
    """Of some numbers of some leaves, the same for all clients; empty where nothing was sent."""
    keys = [(part, leaf) for part in sorted(tree) for leaf in sorted(tree[part])]
    if not keys:
        return ""
    flat = [tree[part][leaf].detach().reshape(-1) for part, leaf in keys[:: max(1, len(keys) // LEAVES)]]
    some = torch.cat([x[:: max(1, x.numel() // SAMPLE)].float() for x in flat])
    return hashlib.blake2b(some.cpu().numpy(), digest_size=12).hexdigest()
