"""Who takes part: how the rows are split, what each client can afford, and who is asked in which round."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.engines.cohort import (
    draw_capabilities,
    draw_poisson,
    draw_share,
    parse_capability,
    parse_profile,
    scale_down,
)
from fedlora.engines.partition import (
    Partitioner,
    apportion,
    build_partitioner,
    draw_label_order,
    draw_test_rows,
    select_own_test_rows,
)
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Data, Shard

DROPPED = "dropped out (clients.dropout)"  # why a client that was drawn to is absent
MOST = 1_000_000  # clients: each is drawn, split and listed


@dataclass(frozen=True)
class Clients:
    """The ``[clients]`` table."""

    count: int = 10
    per_round: int | None = None  # how many take part in a round; None: all
    sampling: Literal["fixed", "poisson"] = "fixed"  # so many a round, or each by itself with probability rate
    rate: float | None = None  # poisson only
    ranks: int | list[int] | dict[str, float] | None = None  # LoRA rank or number of heads, a client; None: all of it
    partition: dict[str, Any] = field(default_factory=lambda: {"name": "iid"})  # see partition.py
    permute_labels: bool = False  # every client calls the labels by an order of its own (concept shift)
    new: int = 0  # so many of the count, the last ones, never take part; `fedlora personal` scores them
    capability: str | list[float] | dict[str, float] | None = None  # a profile, see cohort.py; None: all are equal
    capability_scales: list[Literal["rank", "steps"]] = field(default_factory=lambda: ["rank"])  # what follows from it
    local_steps: int | list[int] | dict[str, int] | None = None  # a client; a dict goes by capability
    dropout: float = 0.0  # share of a round's cohort that is sent its order and never replies
    stragglers: float = 0.0  # share of a round's cohort that does only a part of its steps
    straggler_work: float = 0.5  # that part

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"clients.count is {self.count}; a federation needs at least 1 client.")
        if self.count > MOST:
            raise ValueError(f"clients.count is {self.count}; a federation here has at most {MOST:,} clients.")
        if not 0 <= self.new < self.count:
            raise ValueError(f"clients.new is {self.new}; it lies between 0 and below clients.count, {self.count}.")
        if self.per_round is not None and not 1 <= self.per_round <= self.members:
            less = f" less clients.new, {self.members}" if self.new else f", {self.count}"
            raise ValueError(f"clients.per_round is {self.per_round}; it lies between 1 and clients.count{less}.")
        self.partitioner  # noqa: B018 - a wrong partition is reported at once
        if self.new and self.own_data:
            raise ValueError(
                "clients.new holds out clients of a partition, and clients.partition is 'own'; leave it out."
            )
        self._check_sampling()
        self._check_shares()
        self._check_capability()
        self._check_steps()

    def _check_sampling(self) -> None:
        if (self.sampling == "poisson") != (self.rate is not None):
            raise ValueError(
                f"clients.sampling is {self.sampling!r} and clients.rate is {self.rate}; a rate goes with 'poisson', "
                "and with it alone."
            )
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"clients.rate is {self.rate}; it is a probability, above 0 and up to 1.")
        if self.rate is not None and self.per_round is not None:
            raise ValueError("clients.rate and clients.per_round are both set; keep one of them.")

    def _check_shares(self) -> None:
        fits = {
            "dropout": (0 <= self.dropout < 1, "from 0 to below 1"),
            "stragglers": (0 <= self.stragglers <= 1, "from 0 to 1"),
            "straggler_work": (0 < self.straggler_work <= 1, "above 0 and up to 1"),
        }
        for key, (fit, ends) in fits.items():
            if not fit:
                raise ValueError(f"clients.{key} is {getattr(self, key)}; it is a share, {ends}.")

    def _check_capability(self) -> None:
        for scale, key in (("rank", "ranks"), ("steps", "local_steps")):
            if self.capability is not None and scale in self.capability_scales and getattr(self, key) is not None:
                raise ValueError(
                    f"clients.capability scales the {scale} and clients.{key} sets it; keep one of them, or take "
                    f"{scale!r} out of clients.capability_scales."
                )
        if self.capability is not None:
            parse_profile(self.capability)

    def _check_steps(self) -> None:
        steps = self.local_steps
        each = list(steps.values()) if isinstance(steps, dict) else [steps] if isinstance(steps, int) else steps
        if each is not None and (not each or min(each) < 1):
            raise ValueError(
                f"clients.local_steps is {steps!r}; it is a number, a list or a table, of at least 1 each."
            )
        if isinstance(steps, dict):
            self._by_capability(steps)

    def _by_capability(self, steps: dict[str, int]) -> dict[float, int]:
        """Local steps by capability; ``ValueError`` where a client would have none."""
        if self.capability is None:
            raise ValueError("clients.local_steps goes by capability, and there is none; set clients.capability.")
        found = {parse_capability("clients.local_steps", key): many for key, many in steps.items()}
        missing = [level for level in parse_profile(self.capability) if level not in found]
        if missing:
            raise ValueError(f"clients.local_steps has no number for the capability {missing[0]:g}; add it.")
        return found

    @property
    def members(self) -> int:
        """How many clients take part: all but the new ones. Their numbers are 0 to ``members - 1``."""
        return self.count - self.new

    @property
    def remaining_sizes(self) -> tuple[int, int]:
        """How many clients of a round stay, at the least and at the most."""
        if self.rate is not None:
            return 0, self.members
        cohort = self.per_round or self.members
        gone = self.dropout * cohort
        return max(1, cohort - math.ceil(gone)), max(1, cohort - math.floor(gone))

    @property
    def partitioner(self) -> Partitioner:
        """The partitioner that ``partition`` names."""
        return build_partitioner(self.partition)

    @property
    def client_column(self) -> str | None:
        """The column that tells the clients apart, where the partition goes by one."""
        return getattr(self.partitioner, "column", None)

    @property
    def own_data(self) -> bool:
        """Whether every party brings data of its own, on its own machine."""
        return self.partitioner.own

    def shards(self, data: Data, seed: int) -> list[Shard]:
        """Every client's rows; training rows are disjoint, test rows follow their training labels.

        ``ValueError`` names a client that would have no rows.
        """
        if self.count > len(data.train):
            rows = len(data.train)
            raise ValueError(f"clients.count is {self.count}, but there are only {rows} training rows; lower it.")
        train = self.partitioner.rows(data.train, self.count, derive_seed(seed, "split"))
        for client, rows in enumerate(train):
            if len(rows) == 0:
                raise ValueError(
                    f"client {client} got no training rows; lower clients.count, or make clients.partition more even."
                )
        tests = None if self.client_column is None else select_own_test_rows(data, train)
        tests = tests or draw_test_rows(data, train, seed)
        orders = self._orders(len(data.label_names), seed)
        return [Shard(*rows) for rows in zip(train, tests, orders)]

    def _orders(self, labels: int, seed: int) -> list[Tensor | None]:
        if not self.permute_labels:
            return [None] * self.count
        if labels < 2:
            raise ValueError("clients.permute_labels is set, but the rows of this task have no labels; leave it out.")
        seen: set[tuple[int, ...]] = set()
        return [draw_label_order(labels, derive_seed(seed, "labels", client), seen) for client in range(self.count)]

    def budgets(self, full: int, seed: int) -> list[int]:
        """Each client's rank, or number of heads, at most ``full``."""
        ranks = self.ranks
        if self.capability is not None and "rank" in self.capability_scales and full > 0:
            found = [scale_down(full, share) for share in self.capabilities(seed) or []]
        elif ranks is None:
            found = [full] * self.count
        elif isinstance(ranks, int):
            found = [ranks] * self.count
        elif isinstance(ranks, list) and ranks:
            found = [ranks[client % len(ranks)] for client in range(self.count)]
        else:
            found = self._draw_ranks(ranks, seed)
        for rank in found:
            if not 0 <= rank <= full or (full > 0 and rank < 1):
                raise ValueError(
                    f"clients.ranks gives a client {rank}; it lies between 1 and what the adapter has, {full}."
                )
        return found

    def _draw_ranks(self, ranks: Any, seed: int) -> list[int]:
        """Ranks by shares of the clients, in a seeded order."""
        if (
            not isinstance(ranks, dict)
            or not ranks
            or not all(str(r).isdigit() for r in ranks)
            or min(ranks.values()) < 0
            or sum(ranks.values()) <= 0
        ):
            raise ValueError(
                f'clients.ranks is {ranks!r}; it is a number, a list, or shares such as {{"4" = 0.5, "16" = 0.5}}.'
            )
        counts = apportion([float(share) for share in ranks.values()], self.count)
        flat = [int(rank) for rank, count in zip(ranks, counts) for _ in range(count)]
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(derive_seed(seed, "ranks")))
        return [flat[i] for i in order.tolist()]

    def capabilities(self, seed: int) -> list[float] | None:
        """What each client can do, as a share of the strongest; None where no profile is set."""
        return None if self.capability is None else draw_capabilities(self.capability, self.count, seed)

    def steps(self, usual: int, round: int, client: int, seed: int) -> int:
        """Optimiser steps of a client in a round, where ``usual`` is what ``[training]`` gives everybody."""
        found, own, able = usual, self.local_steps, self.capabilities(seed)
        if isinstance(own, int):
            found = own
        elif isinstance(own, list):
            found = own[client % len(own)]
        elif own is not None and able is not None:
            found = self._by_capability(own)[able[client]]
        elif able is not None and "steps" in self.capability_scales:
            found = scale_down(usual, able[client])
        return scale_down(found, self.straggler_work) if client in self.draw_stragglers(round, seed) else found

    def draw_stragglers(self, round: int, seed: int) -> list[int]:
        """The stragglers of a round's cohort."""
        if not self.stragglers or not self.cohort(round, seed):
            return []
        return draw_share(self.cohort(round, seed), self.stragglers, derive_seed(seed, "stragglers", round))

    def draw_dropouts(self, round: int, seed: int) -> list[int]:
        """The members of a round's cohort that are sent their order and never reply; never the whole cohort."""
        if not self.dropout or not self.cohort(round, seed):
            return []
        cohort = self.cohort(round, seed)
        return draw_share(cohort, self.dropout, derive_seed(seed, "dropout", round), len(cohort) - 1)

    def remaining(self, round: int, seed: int) -> list[int]:
        """The cohort without those that drop out."""
        gone = self.draw_dropouts(round, seed)
        return [client for client in self.cohort(round, seed) if client not in gone]

    def cohort(self, round: int, seed: int) -> list[int]:
        """The clients of a round, in order; drawn without replacement where not all take part."""
        return sorted(self.order(round, seed)[: self.per_round])

    def order(self, round: int, seed: int) -> list[int]:
        """All clients in the order in which a round asks them: the cohort first, then who stands in for the absent."""
        if self.rate is not None:  # nobody stands in: each has its own probability
            return draw_poisson(self.members, self.rate, derive_seed(seed, "cohort", round))
        if self.per_round is None or self.per_round == self.members:
            return list(range(self.members))
        draws = torch.Generator().manual_seed(derive_seed(seed, "cohort", round))
        return torch.randperm(self.members, generator=draws).tolist()

    @property
    def mean_cohort_size(self) -> float:
        """How many clients a round asks, on average."""
        return self.members * self.rate if self.rate is not None else self.per_round or self.members
