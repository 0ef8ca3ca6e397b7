"""The privacy ledger: counts how often each client's data enters a noisy sum, and converts the counts to (ε, δ)."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedlora.engines.clients import Clients
from fedlora.security.privacy import Privacy, dp_sgd
from fedlora.training.local import Training

CLIENT, EXAMPLE = (
    "one client more or less, with all that it holds: what it sends is covered, what it keeps for itself is not",
    "one training row of one client more or less: all that is trained is covered, what a client keeps included",
)


@dataclass
class PrivacyLedger:
    """The privacy that a run spends. Caches the counts, so each round is counted once.

    ``steps`` returns the optimizer steps of a client's turn, given the round and the client.
    """

    privacy: Privacy
    clients: Clients
    training: Training
    rounds: int  # of the whole run
    rows: Mapping[int, int]  # client -> training rows, for the clients whose data this machine knows
    cohort: Callable[[int], Iterable[int]]  # the clients of a round
    steps: Callable[[int, int], int]
    _counted: int = field(default=0, init=False)  # rounds
    _sums: dict[int, int] = field(default_factory=dict, init=False)  # client -> noisy sums of the counted rounds

    @cached_property
    def rates(self) -> dict[int, float]:
        """Client -> the sampling rate of its unit (itself, or one of its rows), for all clients in the ledger.

        The rate is 1 unless the sampling is of the kind that the accountants analyse.
        """
        if self.privacy.by_client:
            # An observer of single uploads knows the client of each.
            rate = 1.0 if self.privacy.noise_on == "upload" else self.clients.rate or 1.0
            return dict.fromkeys(range(self.clients.members), rate)
        here = [client for client in self.rows if client < self.clients.members]
        return {client: dp_sgd.sampling_rate(self.training, self.rows[client]) for client in here}

    @cached_property
    def planned_sums(self) -> dict[int, int]:
        """Client -> noisy sums of the whole run; with a secret sample, each client counts in every round."""
        sums = dict.fromkeys(self.rates, 0)
        for number in range(self.rounds):
            self._add(sums, number, sums if self.clients.rate is not None else self.cohort(number))
        return sums

    def after(self, rounds: int) -> dict[int, int]:
        """Client -> noisy sums in the first ``rounds`` rounds.

        A round counts for its cohort, or for all clients where the accountant knows the sampling.
        """
        sampled = self.privacy.by_client and self.clients.rate is not None
        if rounds < self._counted or not self._sums:
            self._counted, self._sums = 0, dict.fromkeys(self.rates, 0)
        for number in range(self._counted, rounds):
            self._add(self._sums, number, self._sums if sampled else self.cohort(number))
        self._counted = rounds
        return dict(self._sums)

    def _add(self, sums: dict[int, int], number: int, clients: Iterable[int]) -> None:
        """Add for each client one sum for the round, or the steps of its turn."""
        for client in clients:
            if client in sums:
                sums[client] += 1 if self.privacy.by_client else self.steps(number, client)

    def worst(self, sums: Mapping[int, int]) -> list[tuple[float, int]]:
        """Return the pairs of rate and sums that no other pair exceeds in both: ε grows with either."""
        pairs: list[tuple[float, int]] = []
        for pair in sorted({(self.rates[k], n) for k, n in sums.items()}, reverse=True):
            if not pairs or pair[1] > pairs[-1][1]:
                pairs.append(pair)
        return pairs

    @property
    def delta(self) -> float:
        """The δ of the run: for the clients, or for the rows of the client with most rows."""
        if self.privacy.by_client:
            return self.privacy.delta_of(self.clients.members)
        return self.privacy.delta_of(max((self.rows[client] for client in self.rates), default=1))

    @cached_property
    def noise_multiplier(self) -> float:
        """The noise multiplier of the run: one for all clients in the ledger; nan if there are none."""
        if self.privacy.noise_multiplier is not None:
            return self.privacy.noise_multiplier
        pairs, delta = self.worst(self.planned_sums), self.delta
        return max((self.privacy.noise(rate, sums, delta) for rate, sums in pairs), default=math.nan)

    def report_spending(self, rounds: int) -> dict[str, Any]:
        """Return ε of the worst client after ``rounds`` rounds, and its δ; empty without privacy.

        ``epsilon`` is None without noise, and on a machine without rows.
        """
        if not self.privacy.on:
            return {}
        pairs = self.worst(self.after(rounds))
        if not pairs:
            return {"privacy": {"epsilon": None, "delta": None}}
        epsilon = self.privacy.largest_epsilon(self.noise_multiplier, pairs, self.delta)
        return {"privacy": {"epsilon": _finite(epsilon), "delta": self.delta}}

    def spending_line(self, rounds: int) -> str:
        """Return a line for the log of a client that alone knows its rows; empty if the server reports ε."""
        if not (self.privacy.by_example and self.clients.own_data):
            return ""
        now = self.report_spending(rounds)["privacy"]
        return f"fedlora: after round {rounds}, ε = {now['epsilon']} at δ = {now['delta']} for this party's rows"

    def report(self, rounds: int, plan: bool = False) -> dict[str, Any]:
        """Return the guarantee, for summaries, plans and cards; empty without privacy."""
        if not self.privacy.on:
            return {}
        p, z, delta = self.privacy, self.noise_multiplier, self.delta
        sums = self.planned_sums if plan else self.after(rounds)
        epsilons = {client: _finite(p.epsilon(z, self.rates[client], n, delta)) for client, n in sums.items()}
        worst = None if not epsilons or None in epsilons.values() else max(epsilons.values())
        report: dict[str, Any] = {
            "level": p.level, "epsilon": worst, "delta": delta if epsilons else None, "noise_multiplier": _finite(z),
            "clip": p.clip, "noise_on": p.noise_on, "accountant": p.accountant, "rounds": rounds,
            "sampling_rate": max(self.rates.values(), default=None),
            "secret": p.secret, "covers": CLIENT if p.by_client else EXAMPLE,
        }  # fmt: skip
        return {"privacy": report | ({"clients": {str(k): x for k, x in epsilons.items()}} if p.by_example else {})}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
