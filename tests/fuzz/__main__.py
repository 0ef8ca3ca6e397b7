"""A longer run: ``python -m tests.fuzz --cases 100000 --seed 1``; a line a reader, and the sum."""

import argparse
import time

from tests.fuzz.playing import play
from tests.fuzz.targets import targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="for each reader, at most")
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    given = parser.parse_args()
    total = 0
    for name, make in targets().items():
        if given.only in name:
            until = None if given.minutes is None else time.perf_counter() + 60 * given.minutes
            found = play(name, make(), given.cases, given.seed, until)
            total += found.cases
            print(found, flush=True)
    print(f"{total} cases, seed {given.seed}, nothing found")


main()
