"""Secure aggregation: what one client and the server pay, without the network. ``python -m benchmarks.secure``."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fedlora.security.secure_aggregation import PHASES, SecureClient, SecureServer

SIZES, COHORTS = (10**5, 10**6, 10**7), (3, 10, 50)


class Clock:
    """Seconds of each call, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[..., Any], *given: Any) -> Any:
        start = time.perf_counter()
        found = work(*given)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return found

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def session(K: int, d: int, absent: int) -> dict[str, float]:
    """One session in which ``absent`` clients drop out before they send their vectors."""
    server, clock, x, up, down = (
        SecureServer.open(dict.fromkeys(range(K), 1 / K), d, K - K // 3),
        Clock(),
        torch.randn(d),
        0,
        0,
    )
    clients, told = {n: SecureClient(server.session, n) for n in range(K)}, {}
    for phase in PHASES:
        for n in range(absent if phase == "mask" else 0):
            del clients[n]
        for n, client in clients.items():
            given = ([told[n]] if told else []) + ([x] if phase == "mask" else [])
            message = clock(phase, getattr(client, phase), *given)
            clock("receive " + phase, server.receive, message)
            last = n == K - 1
            up, down = up + last * len(message.body), down + last * (len(told[n].body) if told else 0)
        told = clock("close", server.close)
    clock("close", server.outcome)
    client = sum(clock.median(phase) for phase in PHASES)
    upload, ending = clock.median("receive masked"), sum(clock.seconds["close"])
    return {"client": client, "server, an upload": upload, "server, the rest": ending, "up": up, "down": down}


def measure() -> list[dict[str, float]]:
    """Medians over the clients of a session, and over sessions where they are short."""
    rows = []
    for d in SIZES:
        for K in COHORTS:
            for absent in (0, K // 3):
                runs = [session(K, d, absent) for _ in range(1 if K * d > 10**8 else 5)]
                found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                rows.append({"d": d, "K": K, "absent": absent, **found})
                print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure()
