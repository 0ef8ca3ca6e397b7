"""What tests cost: ``python -m scripts.test_times FILE`` prints the slowest tests and the sum by folder.

FILE is what ``pytest --times FILE`` wrote; ``make test-times`` does both. ``--write`` also records the mean seconds of
each test function in tests/durations.json, by which the tests are distributed over the workers.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from tests.fixtures.schedule import DURATIONS, function

SHORTEST = 0.1  # seconds of a test function that is worth a line in durations.json


def read(path: Path) -> dict[str, tuple[float, float]]:
    """Seconds and processor seconds of each test, all phases together."""
    found: dict[str, tuple[float, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        seconds, processor = found.get(row["test"], (0.0, 0.0))
        found[row["test"]] = seconds + row["seconds"], processor + row["processor_seconds"]
    return found


def sums(times: dict[str, tuple[float, float]], key) -> list[tuple[str, float, float, int]]:
    """Name, seconds, processor seconds and number of tests by ``key(test)``, the longest first."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for test, pair in times.items():
        found[key(test)].append(pair)
    rows = [(name, sum(a for a, _ in pairs), sum(b for _, b in pairs), len(pairs)) for name, pairs in found.items()]
    return sorted(rows, key=lambda row: -row[1])


def folder(test: str) -> str:
    """``tests/flower`` of ``tests/flower/test_x.py::test_y``; a test file without a folder stands for itself."""
    return "/".join(test.partition("::")[0].split("/")[:2])


def table(title: str, rows: list[tuple[str, float, float, int]]) -> str:
    lines = [f"{'seconds':>9} {'processor':>9} {'tests':>6}  {title}"]
    lines += [f"{seconds:9.1f} {processor:9.1f} {count:6d}  {name}" for name, seconds, processor, count in rows]
    return "\n".join(lines)


def record(times: dict[str, tuple[float, float]]) -> None:
    means = {name: round(seconds / count, 2) for name, seconds, _, count in sums(times, function)}
    kept = {name: means[name] for name in sorted(means) if means[name] >= SHORTEST}
    DURATIONS.write_text(json.dumps(kept, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="record the durations in tests/durations.json")
    arguments = parser.parse_args()
    times = read(arguments.file)
    print(table("the slowest tests", sums(times, lambda test: test)[:20]))
    print(table("by folder", [*sums(times, folder), *[("all", *x[1:]) for x in sums(times, lambda test: "all")]]))
    if arguments.write:
        record(times)


if __name__ == "__main__":
    main()
