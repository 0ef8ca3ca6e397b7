"""So many mutated inputs for a reader: how many were taken and refused; a crash names the input that made it."""

import random
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import Target

SLOW = 20.0  # processor seconds that one input may take
MEMORY = 64 * 2**20  # bytes that one input may take beyond what was there


class Found(AssertionError):  # noqa: N818 - it is what a fuzzer finds
    """An input that a reader did not take as it should."""


@dataclass
class Played:
    """What became of a target's inputs."""

    name: str
    seed: int
    cases: int = 0
    taken: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    reasons: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.cases} cases from seed {self.seed}, {self.taken} taken, {self.refused} refused for "
            f"{len(self.reasons)} reasons, {self.seconds:.1f} s, slowest {self.slowest * 1e3:.0f} ms"
        )


def one(target: Target, data: bytes) -> str | None:
    """Why the reader refuses the input; None where it takes it. ``Found`` for anything else that comes of it."""
    try:
        target.read(data)
    except ValueError as error:
        text = str(error)
        if not text or "Traceback" in text:
            raise Found(f"no sentence: {text!r} for {data!r}") from error
        return text
    except (RecursionError, MemoryError, Exception) as error:
        raise Found(f"{type(error).__name__}: {error} for {data!r}") from error
    return None


def play(name: str, target: Target, cases: int, seed: int, until: float | None = None) -> Played:
    """The sound inputs, which must be taken, and then so many mutated ones, or as many as fit before ``until``."""
    for data in target.corpus:
        if (why := one(target, data)) is not None:
            raise Found(f"{name} refuses a sound input: {why}")
    draws, found, began = random.Random(f"{name} {seed}"), Played(name, seed), time.perf_counter()
    while found.cases < cases and (until is None or time.perf_counter() < until):
        then = time.process_time()  # a busy machine slows the clock down, not the reader
        why = one(target, mutated(target.corpus, draws))
        took = time.process_time() - then
        if took > SLOW:
            raise Found(f"{name}: case {found.cases} of seed {seed} took {took:.1f} s")
        found.slowest = max(found.slowest, took)
        found.cases += 1
        found.taken += why is None
        found.refused += why is not None
        found.reasons.update([why.rpartition(": ")[2][:40]] if why is not None else [])
    found.seconds = time.perf_counter() - began
    return found


def memory(target: Target, cases: int, seed: int) -> int:
    """The most Python memory that one of so many inputs took, in bytes."""
    draws, most = random.Random(seed), 0
    tracemalloc.start()
    for _ in range(cases):
        data = mutated(target.corpus, draws)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        one(target, data)
        most = max(most, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return most
