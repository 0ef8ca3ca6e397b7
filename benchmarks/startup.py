"""What starting costs: Python alone, ``import fedlora`` and ``fedlora --help``, in turn, in one run."""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMES = 15
COMMANDS = {
    "python": ["-c", "pass"],
    "import fedlora": ["-c", "import fedlora"],
    "fedlora --help": ["-m", "fedlora", "--help"],
    "fedlora --version": ["-m", "fedlora", "--version"],
}


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Median seconds of whole processes, each in turn, and what of them is not Python's own start.

    The ratio to Python's start of the same round is what can be compared between machines, and busy times.
    """
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for arguments in COMMANDS.values():
        _seconds(arguments)  # so that every file has been read once
    for _ in range(TIMES):
        for name, arguments in COMMANDS.items():
            found[name].append(_seconds(arguments))
    bare = found["python"]
    return {
        name: {
            "seconds, median": round(statistics.median(own), 4),
            "seconds, least": round(min(own), 4),
            "above python, median": round(statistics.median(x - y for x, y in zip(own, bare)), 4),
            "ratio to python, median": round(statistics.median(x / y for x, y in zip(own, bare)), 2),
        }
        for name, own in found.items()
    } | {"processor seconds": {name: round(_processor(arguments), 4) for name, arguments in COMMANDS.items()}}


def _seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def _processor(arguments: list[str]) -> float:
    """Median processor time, which a busy machine leaves nearly as it is."""
    import resource

    used = []
    for _ in range(TIMES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _seconds(arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(used)
