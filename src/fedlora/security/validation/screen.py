"""Screens one round's uploads: each is accepted, or rejected with the reason.

``conduct`` is the memory of earlier rounds, a plain table that can be written as JSON: ``strikes`` (client -> number
of rounds with a rejected upload) and ``seen`` (client -> digest of its last accepted upload).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedlora.rounds import Received, Rules
from fedlora.security.validation.expected import CheckedUpload, RefusedError, UploadSpec, UploadSpecs, check_upload
from fedlora.security.validation.settings import ENOUGH, Validation
from fedlora.security.validation.update_norms import (
    Movement,
    ServedLeaves,
    measure_movement,
    served_norm,
    update_norm,
)
from fedlora.types import Tree

STRIKES, SEEN = "strikes", "seen"
SIDES = ("input", "output")
RESTLESS = 2.0  # medians of the movement: if all clients moved less far, norms of products are not computed
UNMOVED = 0.5  # share of the served norm: a factor that moved less far does not harm a mean


class Rejected(NamedTuple):
    """An upload that was rejected."""

    reason: str
    tree: Tree


def excluded_clients(limits: Validation, conduct: Mapping[str, Mapping[str, Any]]) -> frozenset[int]:
    """The clients that were rejected too often and take no further part."""
    strikes = conduct.get(STRIKES, {})
    return frozenset(int(client) for client, times in strikes.items() if 0 < limits.strikes <= times)


@dataclass
class UploadScreen:
    """Screens the uploads of one round; ``shared`` is the tree that its cohort was served."""

    limits: Validation
    rules: Rules
    shared: Tree
    conduct: dict[str, dict[str, Any]]
    alone: bool = False  # never compare uploads: with client-level privacy, one would show in the others
    rejected: dict[int, Rejected] = field(default_factory=dict)
    movements: dict[int, Movement] = field(default_factory=dict)
    starts: dict[int, CheckedUpload] = field(default_factory=dict)  # without the leaves, which may be on disk
    specs: UploadSpecs = field(init=False, repr=False)
    served: WeakKeyDictionary[UploadSpec, ServedLeaves] = field(default_factory=WeakKeyDictionary, repr=False)

    def __post_init__(self) -> None:
        self.specs = UploadSpecs(self.rules, self.shared)

    def check(self, upload: Received) -> Received | None:
        """Checks one upload by itself; returns it in the server's types, or None if it is rejected."""
        client = upload.turn.client
        try:
            spec = self.specs.of(upload.turn)
            found = check_upload(self.rules, upload.turn, upload.tree, spec)
            self.movements[client] = measure_movement(found, self._served_leaves(spec, found))
            self.starts[client] = found._replace(tree={})
            self._check_copy(client)
        except RefusedError as error:
            self.refuse(upload, str(error))
            return None
        self.rejected.pop(client, None)  # it was asked again, and this one is valid
        return upload._replace(tree=found.tree)

    def refuse(self, upload: Received, reason: str) -> None:
        """Rejects an upload."""
        client = upload.turn.client
        self.rejected[client] = Rejected(reason, upload.tree)
        self.movements.pop(client, None)

    def compare(self, uploads: Sequence[Received], steps: Callable[[Received], int]) -> list[Received]:
        """Compares the uploads of a round; returns those that are no outliers, with capped numbers of rows.

        ``steps`` gives the optimiser steps of a client's turn: with more steps, it may move farther.
        """
        known = {u.turn.client: u for u in uploads if u.turn.client in self.movements}
        if len(known) >= ENOUGH and not self.alone:
            work = {client: steps(upload) for client, upload in known.items()}
            for client, reason in self._outliers(known, work).items():
                self.refuse(known[client], reason)
        good = [u for u in uploads if u.turn.client not in self.rejected]
        claims = self.limits.cap_examples([u.examples for u in good])
        return [u if u.examples == claim else u._replace(examples=claim) for u, claim in zip(good, claims)]

    def record_conduct(self) -> None:
        """Adds the round's rejections and digests to ``conduct``."""
        strikes, seen = self.conduct.setdefault(STRIKES, {}), self.conduct.setdefault(SEEN, {})
        for client in sorted(self.rejected):
            strikes[str(client)] = strikes.get(str(client), 0) + 1
        seen.update({str(client): moved.digest for client, moved in sorted(self.movements.items()) if moved.digest})

    def _served_leaves(self, spec: UploadSpec, found: CheckedUpload) -> ServedLeaves:
        """Computed once for all uploads with exactly the leaves of the spec."""
        if found.start is not spec.start:
            return ServedLeaves(self.rules, found)
        if spec not in self.served:
            self.served[spec] = ServedLeaves(self.rules, found)
        return self.served[spec]

    def _check_copy(self, client: int) -> None:
        """``RefusedError`` if the upload is a copy of another client's last one."""
        own = self.movements[client].digest
        if self.alone:
            return
        for other, found in self.conduct.get(SEEN, {}).items():
            if own and found == own and other != str(client):
                raise RefusedError(f"it sent what client {other} had sent before")

    def _outliers(self, uploads: Mapping[int, Received], work: Mapping[int, int]) -> dict[int, str]:
        """The clients whose upload is an outlier, and the reason.

        Norms of products are computed only if some client's factors moved more than ``RESTLESS`` medians: if all
        moved about as far, no product is many times another.
        """
        usual = median(work.values())
        more = {client: max(1.0, work[client] / usual) for client in uploads}
        if not self._has_restless(list(uploads), torch.tensor(list(more.values()), dtype=torch.float64)):
            return {}
        limits, bad = self.limits, dict[int, str]()
        norms = {
            k: update_norm(self.rules, self.starts[k].start, self.starts[k].products, u.tree, self.movements[k])
            for k, u in uploads.items()
        }
        middle = median(norms.values())
        for client, size in norms.items():
            if middle > 0 and size > limits.norm_limit * middle * more[client]:
                times = f"{size / middle:.3g}"
                bad[client] = f"its update's norm is {times} times the round's median, above validation.norm_limit"
        explained = {k: max(more[k], norms[k] / middle) if middle > 0 else more[k] for k in uploads}
        for side in (0, 1):
            for client, far in self._turned_factors(explained, side).items():
                bad.setdefault(
                    client,
                    f"its {SIDES[side]} factors moved {far:.3g} times as far as the median's, and its update did not: "
                    "the pair is rescaled or turned (validation.factor_limit)",
                )
        return bad

    def _has_restless(self, clients: Sequence[int], more: Tensor) -> bool:
        """Whether a client moved much farther than the median: on one side of the pairs, in all other leaves, or in one
        weight alone."""
        known = [self.movements[client] for client in clients]
        parts = sorted(set.intersection(*(set(one.sides) for one in known)))
        sides = torch.tensor([[one.sides[p] for p in parts] for one in known], dtype=torch.float64)
        sides = sides.reshape(len(known), len(parts), 2).sqrt()
        others = [sum(x for part, x in one.leaves.items() if part not in one.sides) ** 0.5 for one in known]
        whole = torch.cat([sides.square().sum(1).sqrt(), torch.tensor(others, dtype=torch.float64)[:, None]], dim=1)
        if bool((whole > RESTLESS * _middle(whole)).any()):
            return True
        weights = sides.flatten(1)
        return bool((weights > self.limits.norm_limit * more[:, None] * _middle(weights)).any())

    def _turned_factors(self, explained: Mapping[int, float], side: int) -> dict[int, float]:
        """Client -> movement of its factors of one side in medians, if too large over all weights or in one of them."""
        bad: dict[int, float] = {}
        parts = sorted(set.intersection(*(set(self.movements[client].sides) for client in explained)))
        whole = [(parts, self.limits.factor_limit)] if parts else []
        for some, limit in [*whole, *(([part], self.limits.norm_limit) for part in parts)]:
            distance = {k: sum(self.movements[k].sides[p][side] for p in some) ** 0.5 for k in explained}
            middle = median(distance.values())
            suspects = [k for k, far in distance.items() if middle > 0 and far > limit * middle * explained[k]]
            for client in suspects:
                if distance[client] > UNMOVED * served_norm(self.rules, self.starts[client].start, some, side):
                    bad.setdefault(client, distance[client] / middle)
        return bad


def _middle(x: Tensor) -> Tensor:
    """Medians of the columns; several times faster than ``quantile`` for so few rows."""
    many = len(x)
    return x.sort(dim=0).values[(many - 1) // 2 : many // 2 + 1].mean(0)
