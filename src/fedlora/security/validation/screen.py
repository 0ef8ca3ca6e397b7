"""Screens one round's uploads: each is accepted, or rejected with the reason.

``conduct`` is the record of earlier rounds, a plain table that can be written as JSON: ``strikes`` (client -> number
of rounds with a rejected upload) and ``seen`` (client -> digest of its last accepted upload).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedlora.files import save_tree
from fedlora.rounds import Received, Rules
from fedlora.security.validation.expected import CheckedUpload, RefusedError, UploadSpec, UploadSpecs, check_upload
from fedlora.security.validation.settings import ENOUGH, Validation
from fedlora.security.validation.update_norms import Movement, ServedLeaves, measure_movement, served_norm, update_norm
from fedlora.types import Tree

STRIKES, SEEN = "strikes", "seen"
RESTLESS = 2.0  # medians of the movement: if all clients moved less far, norms of products are not computed
UNMOVED = 0.5  # share of the served norm: a factor that moved less far does not harm a mean


class Rejected(NamedTuple):
    """An upload that was rejected."""

    reason: str
    tree: Tree


def excluded_clients(limits: Validation, conduct: Mapping[str, Mapping[str, Any]]) -> frozenset[int]:
    """Return the clients that were rejected too often and take no further part."""
    strikes = conduct.get(STRIKES, {})
    return frozenset(int(client) for client, times in strikes.items() if 0 < limits.strikes <= times)


@dataclass
class UploadScreen:
    """Screens the uploads of one round; ``shared`` is the tree that its cohort was served."""

    limits: Validation
    rules: Rules
    shared: Tree
    conduct: dict[str, dict[str, Any]]
    alone: bool = False  # compare no uploads: with client-level privacy, one would affect the others
    rejected: dict[int, Rejected] = field(default_factory=dict)
    movements: dict[int, Movement] = field(default_factory=dict)
    starts: dict[int, CheckedUpload] = field(default_factory=dict)  # without the leaves, which may be on disk
    specs: UploadSpecs = field(init=False, repr=False)
    served: WeakKeyDictionary[UploadSpec, ServedLeaves] = field(default_factory=WeakKeyDictionary, repr=False)

    def __post_init__(self) -> None:
        self.specs = UploadSpecs(self.rules, self.shared)

    def check(self, upload: Received) -> Received | None:
        """Check one upload by itself; return it in the server's types, or None if it is rejected."""
        client = upload.turn.client
        try:
            spec = self.specs.of(upload.turn)
            checked = check_upload(self.rules, upload.turn, upload.tree, spec)
            served = self.served.get(spec) if checked.start is spec.start else None  # one for all with these leaves
            if served is None:
                served = ServedLeaves(self.rules, checked)
                if checked.start is spec.start:
                    self.served[spec] = served
            self.movements[client] = measure_movement(checked, served)
            self.starts[client] = checked._replace(tree={})
            digest = self.movements[client].digest
            for other, last in self.conduct.get(SEEN, {}).items():
                if digest and last == digest and other != str(client) and not self.alone:
                    raise RefusedError(f"it sent what client {other} had sent before")
        except RefusedError as error:
            self.refuse(upload, str(error))
            return None
        self.rejected.pop(client, None)  # it was asked again, and this one is valid
        return upload._replace(tree=checked.tree)

    def refuse(self, upload: Received, reason: str) -> None:
        """Reject an upload."""
        self.rejected[upload.turn.client] = Rejected(reason, upload.tree)
        self.movements.pop(upload.turn.client, None)

    def compare(self, uploads: Sequence[Received], steps: Callable[[Received], int]) -> list[Received]:
        """Compare the uploads of a round; return those that are no outliers, with capped numbers of rows.

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
        """Add the round's rejections and digests to ``conduct``."""
        strikes, seen = self.conduct.setdefault(STRIKES, {}), self.conduct.setdefault(SEEN, {})
        for client in sorted(self.rejected):
            strikes[str(client)] = strikes.get(str(client), 0) + 1
        seen.update({str(client): moved.digest for client, moved in sorted(self.movements.items()) if moved.digest})

    def _outliers(self, uploads: Mapping[int, Received], work: Mapping[int, int]) -> dict[int, str]:
        """Return the clients whose upload is an outlier, with the reason.

        Norms of products are computed only if some client's factors moved more than ``RESTLESS`` medians: if all
        moved about as far, no product is many times another.
        """
        usual = median(work.values())
        more = {client: max(1.0, work[client] / usual) for client in uploads}
        if not self._has_restless(list(uploads), torch.tensor(list(more.values()), dtype=torch.float64)):
            return {}
        norms = {
            k: update_norm(self.rules, self.starts[k].start, self.starts[k].products, u.tree, self.movements[k])
            for k, u in uploads.items()
        }
        middle, bad = median(norms.values()), dict[int, str]()
        explained = {k: max(more[k], norms[k] / middle) if middle > 0 else more[k] for k in uploads}
        for client, norm in norms.items():
            if middle > 0 and norm > self.limits.norm_limit * middle * more[client]:
                times = f"{norm / middle:.3g}"
                bad[client] = f"its update's norm is {times} times the round's median, above validation.norm_limit"
        for side, name in enumerate(("input", "output")):
            for client, far in self._turned_factors(explained, side).items():
                bad.setdefault(
                    client,
                    f"its {name} factors moved {far:.3g} times as far as the median's, and its update did not: "
                    "the pair is rescaled or turned (validation.factor_limit)",
                )
        return bad

    def _has_restless(self, clients: Sequence[int], more: Tensor) -> bool:
        """Whether a client moved much farther than the median, as a whole or in one weight alone.

        The whole has three parts: the input factors, the output factors, and all other leaves.
        """
        moved = [self.movements[client] for client in clients]
        parts = sorted(set.intersection(*(set(m.sides) for m in moved)))
        sides = torch.tensor([[m.sides[p] for p in parts] for m in moved], dtype=torch.float64)
        sides = sides.reshape(len(moved), len(parts), 2).sqrt()
        others = [sum(x for part, x in m.leaves.items() if part not in m.sides) ** 0.5 for m in moved]
        whole = torch.cat([sides.square().sum(1).sqrt(), torch.tensor(others, dtype=torch.float64)[:, None]], dim=1)
        if bool((whole > RESTLESS * _column_medians(whole)).any()):
            return True
        weights = sides.flatten(1)
        return bool((weights > self.limits.norm_limit * more[:, None] * _column_medians(weights)).any())

    def _turned_factors(self, explained: Mapping[int, float], side: int) -> dict[int, float]:
        """Return client -> movement of its factors of one side in medians, if too large in total or in one weight."""
        bad: dict[int, float] = {}
        parts = sorted(set.intersection(*(set(self.movements[client].sides) for client in explained)))
        total = [(parts, self.limits.factor_limit)] if parts else []
        for group, limit in [*total, *(([part], self.limits.norm_limit) for part in parts)]:
            distance = {k: sum(self.movements[k].sides[p][side] for p in group) ** 0.5 for k in explained}
            middle = median(distance.values())
            for client, far in distance.items():
                suspect = middle > 0 and far > limit * middle * explained[client]
                if suspect and far > UNMOVED * served_norm(self.rules, self.starts[client].start, group, side):
                    bad.setdefault(client, far / middle)
        return bad


def write_quarantine(folder: Path | None, number: int, rejected: Mapping[int, Rejected], limits: Validation) -> None:
    """Write ``quarantine/ROUND-CLIENT.safetensors`` (rounds from 1) within the limits of number and size.

    Existing files count. The first ones are kept, since they show the cause of a fault best.
    """
    if folder is None or not rejected:
        return
    place = folder / "quarantine"
    sizes = [path.stat().st_size for path in place.glob("*.safetensors")]
    for client, (reason, tree) in sorted(rejected.items()):
        forms: Tree = getattr(tree, "forms", tree)  # of a tree on disk, without reading it
        sizes.append(sum(x.nbytes for layer in forms.values() for x in layer.values()))
        if len(sizes) > limits.keep_files or sum(sizes) > limits.keep_mb * 1e6:
            return
        save_tree(place / f"{number}-{client}.safetensors", tree, {"reason": reason})


def _column_medians(x: Tensor) -> Tensor:
    """Compute the medians of the columns; for so few rows several times faster than ``quantile``."""
    return x.sort(dim=0).values[(len(x) - 1) // 2 : len(x) // 2 + 1].mean(0)
