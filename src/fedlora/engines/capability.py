"""What unequal clients can do: their capability by a profile, what it scales, and who is slow or away in a round."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import torch

from fedlora.engines.partition import apportioned
from fedlora.registry import unknown
from fedlora.seeds import derived

LEVELS = (0.25, 0.5, 0.75, 1.0)
PROFILES: Mapping[str, tuple[float, ...]] = {  # share of the clients at each level
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "bell": (0.125, 0.375, 0.375, 0.125),
    "skewed": (0.5, 0.25, 0.125, 0.125),
}
Profile = str | list[float] | dict[str, float]


def shares(profile: Profile) -> dict[float, float]:
    """Capability -> share of the clients. ``ValueError`` where the profile is none."""
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(unknown("profile", profile, PROFILES, "profiles (clients.capability)"))
        return dict(zip(LEVELS, PROFILES[profile]))
    given = list(profile.values()) if isinstance(profile, dict) else profile
    fits = isinstance(profile, dict) or len(profile) == len(LEVELS)
    if not fits or not given or not 0 <= min(given) <= sum(given) < math.inf or not sum(given):
        raise ValueError(
            f"clients.capability is {profile!r}; it is {', '.join(map(repr, PROFILES))}, four shares for the "
            'capabilities 1/4, 1/2, 3/4 and 1, or shares by capability such as {"1/4" = 0.5, "1" = 0.5}.'
        )
    levels = [number("clients.capability", key) for key in profile] if isinstance(profile, dict) else LEVELS
    return dict(zip(levels, map(float, given)))


def number(key: str, text: str) -> float:
    """A capability as it is written, ``"1/4"`` or ``"0.25"``. ``ValueError`` where it is none above 0 and up to 1."""
    try:
        found = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        found = 0.0
    if not 0 < found <= 1:
        raise ValueError(f'{key} names the capability {text!r}; it lies above 0 and at most at 1, such as "1/4".')
    return found


def drawn(profile: Profile, count: int, seed: int) -> list[float]:
    """Each client's capability: as many at each as its share says, in a seeded order."""
    return list(_drawn(tuple(shares(profile).items()), count, seed))


@lru_cache(maxsize=64)
def _drawn(profile: tuple[tuple[float, float], ...], count: int, seed: int) -> tuple[float, ...]:
    counts = apportioned([share for _, share in profile], count)
    flat = [level for (level, _), many in zip(profile, counts) for _ in range(many)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derived(seed, "capability")))
    return tuple(flat[i] for i in order.tolist())


def scaled(full: int, share: float) -> int:
    """A share of a whole number, rounded (a half to the even number), and at least 1."""
    return max(1, round(share * full))


def picked(clients: Sequence[int], share: float, seed: int, most: int | None = None) -> list[int]:
    """That share of the clients, ``most`` at most, in order: drawn without replacement.

    Where the share is no whole number of clients, a draw decides between the two next to it, so that the share is
    right in the mean over rounds.
    """
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clients), generator=draws).tolist()
    many = math.floor(share * len(clients) + float(torch.rand((), generator=draws, dtype=torch.float64)))
    return sorted(clients[i] for i in order[: many if most is None else min(many, most)])
