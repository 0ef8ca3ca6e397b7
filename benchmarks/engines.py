"""The same federation on every engine: seconds a round, what is not computing, and what a party's host saves.

Each run is a process of its own, and the engines take turns. Beside the time that passes stands the processor's, of all
processes that a run starts: it says what an engine costs where others use the machine, too. ``benchmarks.wire`` has
the bytes.
"""

import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.federation import MODEL

REPEATS, ROUNDS = 2, 3
MANY, NODES = 20, 3  # clients, where a machine plays all of them, and where each has processes of its own
METHODS = ("fedit", "fedex-lora")
KEYS = ("first round", "steady round", "whole", "processor")
ADOPT = 36  # Linux: orphans of this process' descendants become its children, and their time is counted


def measure(models: Path, data: Path) -> dict[str, Any]:
    """Seconds of all engines, and the bytes of two of them."""
    from benchmarks import wire

    ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)
    many, few = ("inprocess", "ray", "memory"), ("inprocess", "loopback", "no host")
    return {
        "20 clients": {METHODS[0]: _compared(models, data, METHODS[0], MANY, many)},
        "3 nodes": {METHODS[1]: _compared(models, data, METHODS[1], NODES, few)},
        "bytes": wire.measure(models, data),
    }


def table(models: Path, data: Path, method: str, clients: int, rank: int = 8, rounds: int = ROUNDS) -> dict[str, Any]:
    """A configuration: Banking77 on MiniLM-L3, ten steps a client, one thread a client."""
    return {
        "rounds": rounds,
        "model": {"name": str(models / MODEL)},
        "task": {"name": "text-classification", "data": str(data / "banking77"), "test_rows": 300},
        "clients": {"count": clients},
        "adapter": {"name": "lora", "rank": rank, "alpha": 2 * rank},
        "method": {"name": method},
        "training": {"local_steps": 10},
        "engine": {"device": "cpu", "threads": 1},
        "evaluation": {"measure": False},
    }


def _compared(models: Path, data: Path, method: str, clients: int, engines: tuple[str, ...]) -> dict[str, Any]:
    """Medians over the runs; the first engine is the one in process, whose computing is everyone's."""
    asked = table(models, data, method, clients)
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(REPEATS):
        for engine in engines:
            runs[engine].append(_child(engine, asked))
            print(json.dumps({method: {engine: runs[engine][-1]}}), file=sys.stderr, flush=True)
    computing = statistics.median(r["computing"] for r in runs[engines[0]])
    found = {engine: _figures(each, computing) for engine, each in runs.items()}
    for key in KEYS[1:]:
        times = {engine: _ratio(runs[engine], runs[engines[0]], key) for engine in engines[1:]}
        found[f"times the seconds in process: {key}"] = times
    return found


def _figures(runs: list[dict[str, Any]], computing: float) -> dict[str, float]:
    found = {key: statistics.median(run[key] for run in runs) for key in KEYS}
    return {key: round(value, 2) for key, value in found.items()} | {
        "computing": round(computing, 2),
        "not computing": round(found["steady round"] - computing, 2),
    }


def _ratio(runs: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> float:
    """Median of the pairs, which ran one after the other."""
    return round(statistics.median(run[key] / other[key] for run, other in zip(runs, others, strict=True)), 2)


def _child(engine: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """One run. ``whole`` is the command's, loading torch included."""
    began, used = time.perf_counter(), _used()
    command = [sys.executable, "-m", "benchmarks.engines", json.dumps([engine, asked])]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    whole = time.perf_counter() - began
    seconds = [record["seconds"] for record in json.loads(out.stdout.splitlines()[-1])]
    return {
        "first round": seconds[0]["total"],
        "steady round": statistics.median(s["total"] for s in seconds[1:]),
        "computing": statistics.median(s["train"] + s["evaluate"] for s in seconds[1:]),
        "whole": whole,
        "processor": _used() - used,
    }


def _used() -> float:
    """Processor seconds of all descendants that have ended."""
    try:
        while os.waitpid(-1, 0)[0]:
            pass
    except ChildProcessError:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def _here(asked: dict[str, Any]) -> list[Mapping[str, Any]]:
    from fedlora import run
    from fedlora.runs.config import build

    return run(build(asked)).records


def _ray(asked: dict[str, Any]) -> list[Mapping[str, Any]]:
    return _here({**asked, "engine": {**asked["engine"], "name": "flower-simulation"}})


def _memory(asked: dict[str, Any]) -> list[Mapping[str, Any]]:
    return memory(asked)[0]


def memory(asked: dict[str, Any], post: Callable[[Any], Any] = lambda message: message) -> tuple[list, list]:
    """A run on the grid in memory: its records and its ledger's rows; ``post`` sees each message."""
    from tests.fixtures.memory_grid import MemoryGrid

    from fedlora.flower.client_messages import build_simulated_app
    from fedlora.flower.server import FlowerLoop
    from fedlora.runs.config import build

    config = build(asked)
    federation = config.federation()
    nodes = {2 + client: {"client": client} for client in range(federation.clients.count)}
    with TemporaryDirectory(prefix="fedlora-") as place:
        grid = MemoryGrid(build_simulated_app(config.table, Path(place)), nodes, post)
        engine = FlowerLoop(federation=federation, network=config.flower, grid=grid)
        rounds = list(engine.run(federation))
    return [done.record for done in rounds], rounds[-1].ledger


def _loopback(asked: dict[str, Any], **said: Any) -> list[Mapping[str, Any]]:
    """SuperLink and SuperNodes as processes, TLS and a key for each node; ``said`` is in each node's configuration."""
    import tomli_w

    from fedlora.flower.deploy.local import run_local
    from fedlora.runs.config import build
    from fedlora.runs.folder import RunFolder

    with TemporaryDirectory(prefix="fedlora-") as place:
        parties = Path(place) / "parties.toml"
        parties.write_text(tomli_w.dumps({"party": [said for _ in range(asked["clients"]["count"])]}))
        run_local(build(asked), Path(place) / "run", parties, watch=lambda line: None)
        return RunFolder(Path(place) / "run").records


def _no_host(asked: dict[str, Any]) -> list[Mapping[str, Any]]:
    return _loopback(asked, host=False)


ENGINES: Mapping[str, Callable[[dict[str, Any]], list[Mapping[str, Any]]]] = {
    "inprocess": _here, "ray": _ray, "memory": _memory, "loopback": _loopback, "no host": _no_host,
}  # fmt: skip

if __name__ == "__main__":
    engine, asked = json.loads(sys.argv[1])
    print(json.dumps([{"seconds": record["seconds"]} for record in ENGINES[engine](asked)]))
