"""A whole deployment on this machine: one command starts it, runs a federation through it, and stops it."""

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedlora.flower.client_factory import own_table
from fedlora.flower.deploy.app_template import init
from fedlora.flower.deploy.node_config import number
from fedlora.flower.deploy.processes import Loopback
from fedlora.flower.deploy.proxy import log
from fedlora.runs.config import Config, ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.text import shown

ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")  # the last line of a traceback begins so
LONGEST = 500  # characters of an error that are quoted
LOGS, NODES = "logs", "nodes"  # in the run's folder


def run(
    config: Config, out: Path, parties: Path | None = None, insecure: bool = False, watch: Callable[[str], None] = print
) -> Mapping[str, Any]:
    """Runs a federation over a SuperLink and a SuperNode for each party, and returns its summary.

    Beside what a run keeps, ``out`` has each process' log and each party's state, so that a run that was broken off
    goes on when it is called again. ``ConfigError`` for a wrong configuration, ``ChildProcessError`` where the run or
    a process fails.
    """
    out = out.expanduser().absolute()
    configs = nodes(config, out, parties)
    before = {path: path.stat().st_size for path in map(log, configs) if path.exists()}
    with TemporaryDirectory(prefix="fedlora-") as place:
        app = init(Path(place) / "federation", config, out)
        with Loopback({f"client-{number(c)}": c for c in configs}, out / LOGS, insecure=insecure) as flower:
            watch(f"{len(configs)} parties are connected{'' if insecure else ', by TLS and with a key each'}.")
            failed = flower.run(app, watch=lambda line: watch(line) if _said(line) else None)
        reasons = [reason for node in configs if (reason := _reason(node, before))]
        if failed:
            why = "".join(f" {reason}" for reason in reasons)
            what = flower.outcome.rstrip(".")
            raise ChildProcessError(f"the run did not finish: {what}.{why} All other logs: {out / LOGS}.")
        for reason in reasons:
            watch(reason)
    return RunFolder(out).summary


def nodes(config: Config, out: Path, parties: Path | None) -> list[dict[str, Any]]:
    """Each party's node configuration: its number, a folder for its state, a fair share of the processors, its own."""
    count = config.clients.members
    said = [{} for _ in range(count)] if parties is None else _tables(parties)
    if len(said) != count:
        what = "clients.count less clients.new" if config.clients.new else "clients.count"
        raise ConfigError(f"{str(parties)!r} has {len(said)} [[party]] tables, but {what} is {count}.")
    threads = config.engine.threads or max(1, (os.cpu_count() or 1) // count)
    found = []
    for client, own in enumerate(said):
        base = {"client": client, "state": str(out / NODES / str(client)), "engine.threads": threads}
        found.append({**base, **own})
        own_table(config.table, found[-1])  # a wrong key is said before anything is started
    if sorted(map(number, found)) != list(range(count)):
        raise ConfigError(f"the parties are clients {sorted(map(number, found))}; each of 0 to {count - 1} is needed.")
    return found


def _reason(node: Mapping[str, Any], before: Mapping[Path, int]) -> str:
    """The last error in a party's log since the run began; empty where there is none."""
    path = log(node)
    if not path.exists():
        return ""
    new = path.read_bytes()[before.get(path, 0) :].decode(errors="replace").splitlines()
    errors = [line for line in new if ERROR.match(line)]
    return f"Client {number(node)}'s log, {path}, ends with {shown(errors[-1], LONGEST)!r}." if errors else ""


def _tables(path: Path) -> list[dict[str, Any]]:
    try:
        table = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read as TOML: {error}; write a [[party]] table for each."
        ) from error
    return [_flat(own) for own in table.get("party", [])]


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _said(line: str) -> bool:
    """What the run itself prints, or an error; Flower's other lines are in the logs."""
    return line.startswith(("round ", "note: ")) or "ERROR" in line or "rror:" in line
