"""What the accountants are told of a run: how often each client's data went into a noisy sum, and at which rate."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from fedlora.security.privacy import dp_sgd

if TYPE_CHECKING:
    from fedlora.engines.federation import Federation


@dataclass
class Book:
    """Of one federation. Asked round after round it looks at each round once, whatever has gone before."""

    f: "Federation"
    _rounds: int = field(default=0, init=False)
    _sums: dict[int, int] = field(default_factory=dict, init=False)  # client -> noisy sums so far

    @cached_property
    def rates(self) -> dict[int, float]:
        """Of each client of which this machine knows what goes into the figures: with which probability a unit is in
        a sample, where that is sampling of the kind that the accountants know."""
        f = self.f
        if f.privacy.by_client:
            # Who sees single uploads sees whose they are.
            rate = 1.0 if f.privacy.noise_on == "upload" else f.clients.rate or 1.0
            return dict.fromkeys(range(f.clients.members), rate)
        keys: Iterable[int] = f.shards if isinstance(f.shards, Mapping) else range(len(f.shards))
        here = [k for k in keys if k < f.clients.members]
        return {k: dp_sgd.sampling_rate(f.training, len(f.shards[k].train)) for k in here}

    @cached_property
    def planned(self) -> dict[int, int]:
        """Client -> noisy sums of the whole run; a secret sample counts as if each were in every round."""
        f, found = self.f, dict.fromkeys(self.rates, 0)
        for number in range(f.rounds):
            self._add(found, number, found if f.clients.rate is not None else f.cohort(number))
        return found

    def after(self, rounds: int) -> dict[int, int]:
        """Client -> noisy sums in so many rounds: of those that asked it, or of all where the accountant knows the
        sampling."""
        f = self.f
        every = f.privacy.by_client and f.clients.rate is not None
        if rounds < self._rounds or not self._sums:
            self._rounds, self._sums = 0, dict.fromkeys(self.rates, 0)
        for number in range(self._rounds, rounds):
            self._add(self._sums, number, self._sums if every else f.cohort(number))
        self._rounds = rounds
        return dict(self._sums)

    def _add(self, sums: dict[int, int], number: int, clients: Iterable[int]) -> None:
        """One sum a round, or the steps of a client's turn."""
        f = self.f
        for client in clients:
            if client in sums:
                rows = 1 if f.privacy.by_client else len(f.shards[client].train)
                sums[client] += 1 if f.privacy.by_client else f.spends(number, client).steps(rows)

    def worst(self, sums: Mapping[int, int]) -> list[tuple[float, int]]:
        """The pairs of rate and sums that no other pair is as large as in both: ε grows with either."""
        found: list[tuple[float, int]] = []
        for pair in sorted({(self.rates[k], n) for k, n in sums.items()}, reverse=True):
            if not found or pair[1] > found[-1][1]:
                found.append(pair)
        return found
