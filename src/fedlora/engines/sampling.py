"""Draws of clients and of orders, each from a seed of its own."""

import torch


def check(kind: str, rate: float | None, per_round: int | None) -> None:
    """``ValueError`` where the way to sample and its numbers do not fit."""
    if (kind == "poisson") != (rate is not None):
        raise ValueError(
            f"clients.sampling is {kind!r} and clients.rate is {rate}; a rate goes with 'poisson', and with it alone."
        )
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"clients.rate is {rate}; it is a probability, above 0 and up to 1.")
    if rate is not None and per_round is not None:
        raise ValueError("clients.rate and clients.per_round are both set; keep one of them.")


def poisson(members: int, rate: float, seed: int) -> list[int]:
    """The members of a round, each drawn by itself with probability ``rate``; there may be none."""
    draws = torch.Generator().manual_seed(seed)
    return (torch.rand(members, generator=draws, dtype=torch.float64) < rate).nonzero()[:, 0].tolist()


def permutation(labels: int, seed: int, seen: set[tuple[int, ...]]) -> torch.Tensor:
    """An order that no client before has, as long as there are any left."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(100):
        order = torch.randperm(labels, generator=draws)
        if tuple(order.tolist()) not in seen:
            break
    seen.add(tuple(order.tolist()))
    return order
