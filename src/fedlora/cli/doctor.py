"""The command ``doctor``: versions, devices, memory, and a small test of each extra.

Every test runs in its own process, so a package that crashes is reported as broken.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from fedlora.cli._options import Json, print_result, say
from fedlora.runs.error_log import find_version

TIMEOUT = 300.0  # seconds for one test
PACKAGES = {  # test -> the packages that it needs; a name of an extra, or of a part of every installation
    "torch": ("torch",), "model": ("transformers",), "figures": ("altair", "vl-convert-python"), "peft": ("peft",),
    "trl": ("trl", "peft"), "deepspeed": ("deepspeed", "accelerate"), "dp": ("opacus",),
    "llm": ("math-verify", "lm-eval"),
    "flower": ("flwr", "cryptography"), "flower-simulation": ("ray",),
    "quantize": ("bitsandbytes",),
    "track-tensorboard": ("tensorboard",), "track-mlflow": ("mlflow-skinny",), "track-wandb": ("wandb",),
    "track-trackio": ("trackio",),
}  # fmt: skip
CORE = ("torch", "model", "figures")
WORKS, BROKEN, MISSING = "works", "broken", "not installed"
GB = 1e9
RunTest = Callable[[str], Mapping[str, Any]]


def doctor_command(as_json: Json = False) -> None:
    """Show versions, devices and memory, and try one small thing of each installed extra; exit 1 if one is broken."""
    result = examine(begin=lambda name: say(f"trying {name} ...") if sys.stderr.isatty() else None)
    print_result(as_json, result, lambda: describe(result))
    if result["broken"]:
        raise typer.Exit(1)


def examine(run: RunTest | None = None, begin: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Return the state of the installation as JSON-able values.

    ``run`` runs one test, and ``begin`` is called with its name before. A test's ``state`` is "works", "broken" or
    "not installed".
    """
    tests: list[dict[str, Any]] = []
    for name, packages in PACKAGES.items():
        test = {"name": name, "packages": {package: find_version(package) for package in packages}}
        if None in test["packages"].values() and name not in CORE:
            tests.append({**test, "state": MISSING, "said": f"pip install 'fedlora[{name}]'"})
            continue
        begin(name)
        start = time.perf_counter()
        test |= (run or run_in_process)(name)
        tests.append({**test, "seconds": round(time.perf_counter() - start, 1)})
    devices = next((test.pop("devices") for test in tests if "devices" in test), [])
    return {
        "fedlora": find_version("fedlora"), "python": platform.python_version(), "system": platform.platform(),
        "processors": os.cpu_count(), "memory": read_memory(), "disk": shutil.disk_usage(Path.cwd()).free,
        "devices": devices, "tests": tests, "broken": [test["name"] for test in tests if test["state"] == BROKEN],
    }  # fmt: skip


def run_in_process(name: str) -> dict[str, Any]:
    """Run one test in a process of its own; returns its state and its message."""
    command = [sys.executable, "-m", "fedlora.cli._selftests", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"state": BROKEN, "said": f"it did not answer within {TIMEOUT:.0f} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0 and lines:
        return {"state": WORKS, **json.loads(lines[-1])}
    return {"state": BROKEN, "said": lines[-1] if lines else f"it ended with status {done.returncode}"}


def read_memory() -> dict[str, int] | None:
    """Return the bytes of memory in all and available; None if the system does not report them."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in text.splitlines())
    return {key: int(rows[name].split()[0]) * 1024 for key, name in (("bytes", "MemTotal"), ("free", "MemAvailable"))}


def describe(result: Mapping[str, Any]) -> list:
    """Build lines about the machine and a table with a row for each test."""
    from fedlora.runs.table import Column, Table

    memory = result["memory"]
    lines = [f"fedlora {result['fedlora']}, Python {result['python']}, {result['system']}"]
    lines.append(f"processors: {result['processors']}")
    lines += [f"memory: {memory['free'] / GB:.1f} GB free of {memory['bytes'] / GB:.1f}"] if memory else []
    lines.append(f"disk: {result['disk'] / GB:.1f} GB free here")
    for device in result["devices"]:
        gpu = "bytes" in device and f"{device['kind']}, {device['free'] / GB:.1f} GB free of {device['bytes'] / GB:.1f}"
        lines.append(f"{device['name']}: {gpu or '{threads} threads'.format(**device)}")
    rows = [
        {**test, "packages": ", ".join(f"{name} {version or '–'}" for name, version in test["packages"].items())}
        for test in result["tests"]
    ]
    columns = (Column("name", "what"), Column("packages", "packages"), Column("state", "state"), Column("said", "said"))
    table = Table("doctor", "What is installed, and whether it works", columns, rows)
    return [*lines, table, f"Broken: {', '.join(result['broken'])}." if result["broken"] else "Nothing is broken."]
