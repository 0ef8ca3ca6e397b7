"""What is installed here and whether it works: versions, devices, memory, and a small test of each extra.

Every test runs in a process of its own, so a package that crashes says no more than that it is broken.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TIMEOUT = 300.0  # seconds for one test
PACKAGES = {  # what a test is of; without an extra's name it is what every installation has
    "torch": ("torch",), "model": ("transformers",), "figures": ("altair", "vl-convert-python"), "peft": ("peft",),
    "dp": ("opacus",), "flower": ("flwr", "cryptography"), "flower-simulation": ("ray",), "quantize": ("bitsandbytes",),
    "track-tensorboard": ("tensorboard",), "track-mlflow": ("mlflow-skinny",), "track-wandb": ("wandb",),
    "track-trackio": ("trackio",),
}  # fmt: skip
CORE = ("torch", "model", "figures")
WORKS, BROKEN, MISSING = "works", "broken", "not installed"
Run = Callable[[str], Mapping[str, Any]]


def examine(run: Run | None = None, told: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Everything, JSON-able; ``run`` does one test, and ``told`` hears its name before.

    A test's ``state`` is "works", "broken" or "not installed".
    """
    tests = list(_tested(run or in_process_of_its_own, told))
    devices = next((one.pop("devices") for one in tests if "devices" in one), [])
    return {
        "fedlora": version("fedlora"), "python": platform.python_version(), "system": platform.platform(),
        "processors": os.cpu_count(), "memory": memory(), "disk": shutil.disk_usage(Path.cwd()).free,
        "devices": devices, "tests": tests, "broken": [one["name"] for one in tests if one["state"] == BROKEN],
    }  # fmt: skip


def _tested(run: Run, told: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for name, packages in PACKAGES.items():
        found = {package: _version(package) for package in packages}
        if None in found.values() and name not in CORE:
            yield {"name": name, "packages": found, "state": MISSING, "said": f"pip install 'fedlora[{name}]'"}
            continue
        told(name)
        began = time.perf_counter()
        yield {"name": name, "packages": found, **run(name), "seconds": round(time.perf_counter() - began, 1)}


def in_process_of_its_own(name: str) -> dict[str, Any]:
    """One test's state and what was said."""
    command = [sys.executable, "-m", "fedlora.cli._selftests", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"state": BROKEN, "said": f"it did not answer within {TIMEOUT:.0f} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0 and lines:
        return {"state": WORKS, **json.loads(lines[-1])}
    return {"state": BROKEN, "said": lines[-1] if lines else f"it ended with status {done.returncode}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory() -> dict[str, int] | None:
    """Bytes in all and free for use; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in text.splitlines())
    return {key: int(rows[name].split()[0]) * 1024 for key, name in (("bytes", "MemTotal"), ("free", "MemAvailable"))}
