"""Draws of clients: the capability of each, a Poisson sample, and the share that is slow or away in a round."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import torch

from fedlora.engines.partition import apportion
from fedlora.registry import unknown
from fedlora.seeds import derive_seed

LEVELS = (0.25, 0.5, 0.75, 1.0)
PROFILES: Mapping[str, tuple[float, ...]] = {  # share of the clients at each level
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "bell": (0.125, 0.375, 0.375, 0.125),
    "skewed": (0.5, 0.25, 0.125, 0.125),
}
Profile = str | list[float] | dict[str, float]


def parse_profile(profile: Profile) -> dict[float, float]:
    """Returns capability -> share of the clients. Raises ``ValueError`` if the profile is not valid."""
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
    levels = [parse_capability("clients.capability", key) for key in profile] if isinstance(profile, dict) else LEVELS
    return dict(zip(levels, map(float, given)))


def parse_capability(key: str, text: str) -> float:
    """Reads a capability such as ``"1/4"`` or ``"0.25"``. Raises ``ValueError`` if it is not above 0 and up to 1."""
    try:
        found = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        found = 0.0
    if not 0 < found <= 1:
        raise ValueError(f'{key} names the capability {text!r}; it lies above 0 and at most at 1, such as "1/4".')
    return found


def draw_capabilities(profile: Profile, count: int, seed: int) -> list[float]:
    """Returns the capability of each client: as many clients at each level as its share says, in a seeded order."""
    return list(_draw_capabilities(tuple(parse_profile(profile).items()), count, seed))


@lru_cache(maxsize=64)
def _draw_capabilities(profile: tuple[tuple[float, float], ...], count: int, seed: int) -> tuple[float, ...]:
    counts = apportion([share for _, share in profile], count)
    flat = [level for (level, _), many in zip(profile, counts) for _ in range(many)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "capability")))
    return tuple(flat[i] for i in order.tolist())


def scale_down(full: int, share: float) -> int:
    """Returns a share of a whole number, rounded (a half to the even number), and at least 1."""
    return max(1, round(share * full))


def draw_poisson(members: int, rate: float, seed: int) -> list[int]:
    """Draws each member independently with probability ``rate``; the sample may be empty."""
    draws = torch.Generator().manual_seed(seed)
    return (torch.rand(members, generator=draws, dtype=torch.float64) < rate).nonzero()[:, 0].tolist()


def draw_share(clients: Sequence[int], share: float, seed: int, most: int | None = None) -> list[int]:
    """Draws that share of the clients without replacement, ``most`` at most, and returns them in order.

    If the share is not a whole number of clients, it is rounded up or down at random, so that it is right in the mean
    over rounds.
    """
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clients), generator=draws).tolist()
    many = math.floor(share * len(clients) + float(torch.rand((), generator=draws, dtype=torch.float64)))
    return sorted(clients[i] for i in order[: many if most is None else min(many, most)])
