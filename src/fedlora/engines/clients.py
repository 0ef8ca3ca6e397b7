"""The ``[clients]`` table: the partition of the rows, the capability of each client, and the cohort of each round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.engines.partition import (
    PARTITIONERS,
    Partitioner,
    apportion,
    draw_label_order,
    draw_test_rows,
    select_own_test_rows,
)
from fedlora.registry import unknown
from fedlora.schema import construct_by_name
from fedlora.seeds import derive_seed
from fedlora.tasks._base import Data, Shard

DROPPED = "dropped out (clients.dropout)"  # the reason of an absence
MOST = 1_000_000  # clients

LEVELS = (0.25, 0.5, 0.75, 1.0)
PROFILES: Mapping[str, tuple[float, ...]] = {  # share of the clients at each level
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "bell": (0.125, 0.375, 0.375, 0.125),
    "skewed": (0.5, 0.25, 0.125, 0.125),
}


@dataclass(frozen=True)
class Clients:
    """The ``[clients]`` table."""

    count: int = 10
    per_round: int | None = None  # clients in a round; None: all
    sampling: Literal["fixed", "poisson"] = "fixed"  # per_round clients, or each independently with probability rate
    rate: float | None = None  # poisson only
    ranks: int | list[int] | dict[str, float] | None = None  # LoRA ranks or numbers of heads; None: the full one
    # A name, a table of a name and its settings, or in Python a Partitioner; see partition.py.
    partition: str | dict[str, Any] = field(default_factory=lambda: {"name": "iid"})
    permute_labels: bool = False  # every client has its own order of the labels (concept shift)
    new: int = 0  # number of last clients that never take part; `fedlora personal` scores them
    capability: str | list[float] | dict[str, float] | None = None  # a profile; None: all are equal
    capability_scales: list[Literal["rank", "steps"]] = field(default_factory=lambda: ["rank"])
    local_steps: int | list[int] | dict[str, int] | None = None  # of each client, or by capability
    dropout: float = 0.0  # share of a round's cohort that does not reply
    stragglers: float = 0.0  # share of a round's cohort that does only a part of its steps
    straggler_work: float = 0.5  # share of the steps that they do

    def __post_init__(self):
        if isinstance(self.partition, Partitioner):
            settings = {"name": PARTITIONERS.name_of(type(self.partition)), **asdict(self.partition)}
            object.__setattr__(self, "partition", settings)
        if self.count < 1:
            raise ValueError(f"clients.count is {self.count}; a federation needs at least 1 client.")
        if self.count > MOST:
            raise ValueError(f"clients.count is {self.count}; a federation here has at most {MOST:,} clients.")
        if not 0 <= self.new < self.count:
            raise ValueError(f"clients.new is {self.new}; it lies between 0 and below clients.count, {self.count}.")
        if self.per_round is not None and not 1 <= self.per_round <= self.members:
            less = f" less clients.new, {self.members}" if self.new else f", {self.count}"
            raise ValueError(f"clients.per_round is {self.per_round}; it lies between 1 and clients.count{less}.")
        self.partitioner  # noqa: B018 - reports a wrong partition
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
        numbers = list(steps.values()) if isinstance(steps, dict) else [steps] if isinstance(steps, int) else steps
        if numbers is not None and (not numbers or min(numbers) < 1):
            raise ValueError(f"clients.local_steps is {steps!r}; it is a number, a list or a table, each at least 1.")
        if isinstance(steps, dict):
            self._steps_by_capability(steps)

    def _steps_by_capability(self, steps: dict[str, int]) -> dict[float, int]:
        """Return capability -> local steps. ``ValueError`` if a capability has none."""
        if self.capability is None:
            raise ValueError("clients.local_steps goes by capability, and there is none; set clients.capability.")
        by_level = {parse_capability("clients.local_steps", key): number for key, number in steps.items()}
        for level in parse_profile(self.capability):
            if level not in by_level:
                raise ValueError(f"clients.local_steps has no number for the capability {level:g}; add it.")
        return by_level

    @property
    def members(self) -> int:
        """The number of clients that take part: all but the new ones. They are numbered 0 to ``members - 1``."""
        return self.count - self.new

    @property
    def remaining_sizes(self) -> tuple[int, int]:
        """The least and the largest number of clients that reply in a round."""
        if self.rate is not None:
            return 0, self.members
        cohort = self.per_round or self.members
        gone = self.dropout * cohort
        return max(1, cohort - math.ceil(gone)), max(1, cohort - math.floor(gone))

    @property
    def partition_table(self) -> Mapping[str, Any]:
        """The partition's name and the settings that are set. ``ValueError`` if it has neither form."""
        if not isinstance(self.partition, str | dict):
            raise ValueError(
                f"clients.partition is {self.partition!r}; it should be a name, such as 'iid', or a table with one."
            )
        return {"name": self.partition} if isinstance(self.partition, str) else self.partition

    @property
    def partitioner(self) -> Partitioner:
        """The partitioner that ``partition`` names. ``ValueError`` if that table is wrong."""
        return construct_by_name(PARTITIONERS, "clients.partition", self.partition_table)

    @property
    def client_column(self) -> str | None:
        """The column whose values are the clients, if the partition uses one."""
        return getattr(self.partitioner, "column", None)

    @property
    def own_data(self) -> bool:
        """Whether every client has its own data on its own machine."""
        return self.partitioner.own

    def shards(self, data: Data, seed: int) -> list[Shard]:
        """Divide the rows; training rows are disjoint, and test rows have the distribution of the training labels.

        ``ValueError`` if a client would have no rows.
        """
        if self.count > (rows := len(data.train)):
            raise ValueError(f"clients.count is {self.count}, but there are only {rows} training rows; lower it.")
        train = self.partitioner.rows(data.train, self.count, derive_seed(seed, "split"))
        for client, own_rows in enumerate(train):
            if len(own_rows) == 0:
                raise ValueError(
                    f"client {client} got no training rows; lower clients.count, or make clients.partition more even."
                )
        tests = None if self.client_column is None else select_own_test_rows(data, train)
        tests = tests or draw_test_rows(data, train, seed)
        return [Shard(*own) for own in zip(train, tests, self._draw_label_orders(len(data.label_names), seed))]

    def _draw_label_orders(self, labels: int, seed: int) -> list[Tensor | None]:
        if not self.permute_labels:
            return [None] * self.count
        if labels < 2:
            raise ValueError("clients.permute_labels is set, but the rows of this task have no labels; leave it out.")
        seen: set[tuple[int, ...]] = set()
        return [draw_label_order(labels, derive_seed(seed, "labels", client), seen) for client in range(self.count)]

    def budgets(self, full: int, seed: int) -> list[int]:
        """Return each client's rank, or number of heads, at most ``full``."""
        ranks = self.ranks
        if self.capability is not None and "rank" in self.capability_scales and full > 0:
            budgets = [scale_down(full, share) for share in self.capabilities(seed) or []]
        elif isinstance(ranks, list) and ranks:
            budgets = [ranks[client % len(ranks)] for client in range(self.count)]
        elif ranks is None or isinstance(ranks, int):
            budgets = [full if ranks is None else ranks] * self.count
        else:
            budgets = self._draw_ranks(ranks, seed)
        for rank in budgets:
            if not 0 <= rank <= full or (full > 0 and rank < 1):
                raise ValueError(f"clients.ranks gives a client {rank}; it lies between 1 and the adapter's, {full}.")
        return budgets

    def _draw_ranks(self, ranks: Any, seed: int) -> list[int]:
        """Draw the order of ranks that are given by shares of the clients."""
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
        shares = tuple((int(rank), float(share)) for rank, share in ranks.items())
        return list(_draw_values(shares, self.count, derive_seed(seed, "ranks")))

    def capabilities(self, seed: int) -> list[float] | None:
        """Return each client's capability as a share of the strongest; None without a profile."""
        if self.capability is None:
            return None
        shares = tuple(parse_profile(self.capability).items())
        return list(_draw_values(shares, self.count, derive_seed(seed, "capability")))

    def steps(self, usual: int, round: int, client: int, seed: int) -> int:
        """Return a client's optimiser steps in a round; ``usual`` is the number of ``[training]``."""
        steps, setting, levels = usual, self.local_steps, self.capabilities(seed)
        if isinstance(setting, int):
            steps = setting
        elif isinstance(setting, list):
            steps = setting[client % len(setting)]
        elif setting is not None and levels is not None:
            steps = self._steps_by_capability(setting)[levels[client]]
        elif levels is not None and "steps" in self.capability_scales:
            steps = scale_down(usual, levels[client])
        return scale_down(steps, self.straggler_work) if client in self.draw_stragglers(round, seed) else steps

    def draw_stragglers(self, round: int, seed: int) -> list[int]:
        """Draw the stragglers of a round's cohort."""
        cohort = self.cohort(round, seed) if self.stragglers else []
        return draw_share(cohort, self.stragglers, derive_seed(seed, "stragglers", round)) if cohort else []

    def draw_dropouts(self, round: int, seed: int) -> list[int]:
        """Draw the clients of a round's cohort that do not reply; never the whole cohort."""
        cohort, key = self.cohort(round, seed) if self.dropout else [], derive_seed(seed, "dropout", round)
        return draw_share(cohort, self.dropout, key, len(cohort) - 1) if cohort else []

    def remaining(self, round: int, seed: int) -> list[int]:
        """Return the cohort without its dropouts."""
        gone = self.draw_dropouts(round, seed)
        return [client for client in self.cohort(round, seed) if client not in gone]

    def cohort(self, round: int, seed: int) -> list[int]:
        """Return the clients of a round, in order; they are drawn without replacement unless all take part."""
        return sorted(self.order(round, seed)[: self.per_round])

    def order(self, round: int, seed: int) -> list[int]:
        """Return the cohort in the order of its draw, and then the substitutes for absent clients."""
        if self.rate is not None:  # no substitutes: each client has its own probability
            draws = torch.Generator().manual_seed(derive_seed(seed, "cohort", round))
            chosen = torch.rand(self.members, generator=draws, dtype=torch.float64) < self.rate
            return chosen.nonzero()[:, 0].tolist()
        if self.per_round is None or self.per_round == self.members:
            return list(range(self.members))
        return _draw_order(self.members, derive_seed(seed, "cohort", round))

    @property
    def mean_cohort_size(self) -> float:
        """The mean number of clients in a round."""
        return self.members * self.rate if self.rate is not None else self.per_round or self.members


def _draw_order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=64)
def _draw_values(shares: tuple[tuple[Any, float], ...], count: int, seed: int) -> tuple[Any, ...]:
    """Draw a value for each client; the number of clients with a value is its share."""
    counts = apportion([share for _, share in shares], count)
    values = [value for (value, _), many in zip(shares, counts) for _ in range(many)]
    return tuple(values[i] for i in _draw_order(count, seed))


def parse_profile(profile: str | list[float] | dict[str, float]) -> dict[float, float]:
    """Return capability -> share of the clients. Raises ``ValueError`` if the profile is not valid."""
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(unknown("profile", profile, PROFILES, "profiles (clients.capability)"))
        return dict(zip(LEVELS, PROFILES[profile]))
    shares = list(profile.values()) if isinstance(profile, dict) else profile
    fits = isinstance(profile, dict) or len(profile) == len(LEVELS)
    if not fits or not shares or not 0 <= min(shares) <= sum(shares) < math.inf or not sum(shares):
        raise ValueError(
            f"clients.capability is {profile!r}; it is {', '.join(map(repr, PROFILES))}, four shares for the "
            'capabilities 1/4, 1/2, 3/4 and 1, or shares by capability such as {"1/4" = 0.5, "1" = 0.5}.'
        )
    levels = [parse_capability("clients.capability", key) for key in profile] if isinstance(profile, dict) else LEVELS
    return dict(zip(levels, map(float, shares)))


def parse_capability(key: str, text: str) -> float:
    """Read a capability such as ``"1/4"`` or ``"0.25"``. Raises ``ValueError`` if it is not above 0 and up to 1."""
    try:
        level = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        level = 0.0
    if not 0 < level <= 1:
        raise ValueError(f'{key} names the capability {text!r}; it lies above 0 and at most at 1, such as "1/4".')
    return level


def scale_down(full: int, share: float) -> int:
    """Return a share of a whole number, rounded (a half to the even number), and at least 1."""
    return max(1, round(share * full))


def draw_share(clients: Sequence[int], share: float, seed: int, most: int | None = None) -> list[int]:
    """Draw that share of the clients without replacement, ``most`` at most, and return them in order.

    If the share is not a whole number of clients, it is rounded up or down at random, so that it is right in the mean
    over rounds.
    """
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clients), generator=draws).tolist()
    many = math.floor(share * len(clients) + float(torch.rand((), generator=draws, dtype=torch.float64)))
    return sorted(clients[i] for i in order[: many if most is None else min(many, most)])
