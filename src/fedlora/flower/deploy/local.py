"""A whole Flower deployment on this machine: a SuperLink, SuperNodes, TLS and registered node keys.

    with Loopback({"a": {"rows": "a.csv"}, "b": {"rows": "b.csv"}}, logs="logs") as flower:
        status = flower.run("app", {"rounds": 3})  # 0 where the run completed

Each node is a process with its own key, port and configuration, as on a machine of its own; everything is stopped when
the block is left, however it is left. ``run`` starts one for a federation and runs it.
"""

import math
import os
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.flower.deploy import certificates as certs
from fedlora.flower.deploy.app_template import write_app
from fedlora.flower.deploy.client_process import log_path
from fedlora.flower.deploy.node_config import apply_node_config, read_client
from fedlora.flower.deploy.processes import (
    COMMAND,
    CONNECTION,
    HOST,
    FlwrCommand,
    ProcessGroup,
    build_environment,
    find_commands,
    find_free_ports,
    ignore_signals,
    is_listening,
    strip_colours,
    tail,
    unwind_on_signals,
)
from fedlora.runs.config import Config, ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.text import display_safe

SUPERLINK = "superlink"
LAPSE = 70.0  # seconds; Flower holds a node for alive until two heartbeats, of 30 seconds, are due
ONLINE = re.compile(r"SuperNode ID: (\d+)")
Value = str | int | float | bool
ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")  # the last line of a traceback begins so
LONGEST = 500  # characters of an error that are quoted
LOGS, NODES = "logs", "nodes"  # in the run's folder


class Loopback:
    """SuperLink and SuperNodes as processes; ``nodes`` maps each node's name to its node configuration.

    ``logs`` is where each process writes its log; ``certificates`` are those of ``create_certificates`` with a key for
    each node, made for the occasion where none are named. ``poll`` is how often Flower's executors look for work.
    """

    def __init__(
        self,
        nodes: Mapping[str, Mapping[str, Value]],
        logs: str | Path,
        *,
        insecure: bool = False,
        certificates: str | Path | None = None,
        deadline: float = 180.0,
        poll: float = 0.2,
    ):
        self.configs = {name: _check_values(f"the node {name!r}", config) for name, config in nodes.items()}
        for name in certs.check_party_names(list(self.configs)):
            _check_name(name, ())
        self.logs, self.insecure, self.deadline = Path(logs).absolute(), insecure, deadline
        self.certificates = None if certificates is None else Path(certificates).absolute()
        self.poll = poll
        self.ids: dict[str, int] = {}
        self.outcome = ""  # the last run's final status, in Flower's words

    def __enter__(self) -> "Loopback":
        self.commands = find_commands()
        self.folder = Path(tempfile.mkdtemp(prefix="fedlora-flower-"))
        self.group = ProcessGroup(build_environment(self.folder / "home", self.commands, self.poll))
        self.flwr = FlwrCommand(self.group, self.commands / COMMAND)
        self._undo = unwind_on_signals()
        try:
            self._prepare()
            self._start_superlink()
            if not self.insecure:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(self.register, self.configs))
            self._wait({name: self._launch(name) for name in self.configs})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops every process and removes the temporary folder; the logs stay."""
        with ignore_signals():
            self.group.stop()
            shutil.rmtree(self.folder, ignore_errors=True)
        self._undo()

    def run(
        self,
        app: str | Path,
        config: Mapping[str, Value] | None = None,
        watch: Callable[[str], None] = print,
        timeout: float | None = None,
    ) -> int:
        """Runs an app's folder, each line of its log to ``watch``: 0 where it completed, 1 otherwise.

        ``config`` overrides the app's own ``[tool.flwr.app.config]``, and may hold only keys that stand there. The
        run's final status is ``outcome``. After ``timeout`` seconds the run is stopped.
        """
        command = ["run", str(app), CONNECTION, "--stream"]
        if config:
            command += ["-c", str(self._toml(f"run-{len(self.group.started)}", _check_values("the run", config)))]
        until = math.inf if timeout is None else time.monotonic() + timeout
        number, code, lines = self.flwr.stream(command, watch, timeout)
        if number is None:
            raise ChildProcessError(f"Flower did not start the run (exit status {code}): {tail(lines)}")
        self.outcome = self.flwr.wait_for_end(number, until)
        return 0 if self.outcome.startswith("finished:completed") else 1

    def nodes(self) -> dict[str, str]:
        """Each node's state as the SuperLink sees it: registered, online, offline or, where it has none, unknown.

        A node that was killed is offline only when two of its heartbeats are due, up to a minute later.
        """
        found = self.flwr.call("supernode", "list", CONNECTION)["nodes"]
        states = {int(node["node-id"]): node["status"] for node in found}
        return {name: states.get(self.ids.get(name, 0), "unknown") for name in self.configs}

    def add(self, name: str, config: Mapping[str, Value], register: bool = True) -> None:
        """One more node while the others are at work; its key is made where the certificates have none for it."""
        (name,) = certs.check_party_names([name])
        _check_name(name, self.configs)
        self.configs[name] = _check_values(f"the node {name!r}", config)
        self.ports[name] = find_free_ports(1)[0]
        if not self.insecure and not (self.keys / "parties" / name).exists():
            certs.add_party(self.keys, name)
        if not self.insecure and register:
            self.register(name)
        self.start(name)

    def register(self, name: str) -> None:
        """Tells the SuperLink a node's public key."""
        answer = self.flwr.call("supernode", "register", f"{self._key(name)}.pub", CONNECTION)
        self.ids[name] = int(answer["node-id"])

    def start(self, name: str) -> None:
        """Starts a node (again), and returns when the SuperLink has it.

        The SuperLink refuses a key whose node it holds for alive: after a kill that is so for up to a minute.
        """
        self._check_known(name)
        if self.group.alive(name):
            raise ValueError(f"the node {name!r} runs already; kill it first.")
        until = time.monotonic() + LAPSE
        while not self.insecure and name in self.ids and self.nodes()[name] == "online" and time.monotonic() < until:
            time.sleep(1)
        self._wait({name: self._launch(name)})

    def kill(self, name: str) -> None:
        """SIGKILL to a node and all that it started, as a power cut would be."""
        self._check_known(name)
        self.group.kill(name)

    def stop(self, name: str) -> None:
        """Stops a node in order: it signs off, is offline at once, and may start again at once."""
        self._check_known(name)
        self.group.stop(name)

    def restart_superlink(self) -> None:
        """Stops the SuperLink and starts it with the same database and port; the nodes find it again."""
        self.group.stop(SUPERLINK)
        self._start_superlink()

    def _key(self, name: str) -> Path:
        return self.keys / "parties" / name / f"{name}.key"

    def _check_known(self, name: str) -> None:
        if name not in self.configs:
            raise ValueError(f"no node is named {name!r}; there are {', '.join(self.configs)}.")

    def _prepare(self) -> None:
        """Prepares ports, keys, logs and the configuration that ``flwr`` reads."""
        self.logs.mkdir(parents=True, exist_ok=True)
        first, *rest = find_free_ports(1 + len(self.configs))
        self.port, self.ports = first, dict(zip(self.configs, rest, strict=True))
        self.keys = self.certificates or self.folder / "certificates"
        if not self.insecure:
            self._prepare_keys()
        trust = {"insecure": True} if self.insecure else {"root-certificates": str(self.keys / "ca.crt")}
        table = {"default": CONNECTION, CONNECTION: {"address": f"{HOST}:{self.port}", **trust}}
        home = self.folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": table}))

    def _prepare_keys(self) -> None:
        """Makes a key for each node, or checks that the named folder has them."""
        if self.certificates is None:
            certs.create_certificates(self.keys, list(self.configs), [HOST, "localhost"])
        elif lost := [name for name in self.configs if not self._key(name).is_file()]:
            raise ValueError(f"{str(self.keys)!r} has no key for {', '.join(lost)}; make one with certs.add_party.")

    def _start_superlink(self) -> None:
        server = self.keys / "server"
        tls = [
            "--ssl-ca-certfile", str(server / "ca.crt"), "--ssl-certfile", str(server / "server.pem"),
            "--ssl-keyfile", str(server / "server.key"), "--enable-supernode-auth",
        ]  # fmt: skip
        own = ["--host", HOST, "--port", str(self.port), "--database", str(self.folder / "state.db")]
        command = ["flower-superlink", *(["--insecure"] if self.insecure else tls), *own]
        process, _ = self._start_logged(SUPERLINK, command)
        self._until(SUPERLINK, process, lambda: is_listening(self.port), "did not listen")

    def _launch(self, name: str) -> tuple[subprocess.Popen, int]:
        key = str(self._key(name))
        ca = str(self._key(name).parent / "ca.crt")
        secure = ["--root-certificates", ca, "--auth-supernode-private-key", key]
        own = ["--superlink", f"{HOST}:{self.port}", "--host", HOST, "--port", str(self.ports[name])]
        if self.configs[name]:
            own += ["--node-config", str(self._toml(f"node-{name}", self.configs[name]))]
        command = ["flower-supernode", *(["--insecure"] if self.insecure else secure), *own]
        return self._start_logged(name, command, env={"FLWR_HOME": str(self.folder / f"home-{name}")})

    def _start_logged(self, name: str, command: list[str], **options) -> tuple[subprocess.Popen, int]:
        """Starts a process. Returns it and its first place in its log, which may have the lines of an earlier start."""
        with (self.logs / f"{name}.log").open("ab") as log:
            place = log.tell()
            command[0] = str(self.commands / command[0])
            return self.group.start(name, command, stdout=log, stderr=subprocess.STDOUT, **options), place

    def _wait(self, launched: dict[str, tuple[subprocess.Popen, int]]) -> None:
        """Waits until each node has its number from the SuperLink."""
        for name, (process, place) in launched.items():

            def online(name: str = name, place: int = place) -> bool:
                if found := ONLINE.search(self._log(name, place)):
                    self.ids[name] = int(found[1])
                return bool(found)

            self._until(name, process, online, "was not admitted by the SuperLink")

    def _until(self, name: str, process: subprocess.Popen, ready: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + self.deadline
        while not ready():
            if (code := process.poll()) is not None or time.monotonic() > until:
                how = f"ended with status {code}" if code is not None else f"{what} within {self.deadline:g} seconds"
                self.group.stop(name)
                lines = tail(self._log(name).splitlines())
                raise ChildProcessError(f"{name} {how}; its log, {self.logs / name}.log, ends: {lines}")
            time.sleep(0.1)

    def _log(self, name: str, place: int = 0) -> str:
        return strip_colours((self.logs / f"{name}.log").read_bytes()[place:].decode(errors="replace"))

    def _toml(self, name: str, config: Mapping[str, Value]) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(config))
        return path


def _check_values(owner: str, config: Mapping[str, Value]) -> dict[str, Value]:
    for key, value in config.items():
        if not isinstance(value, str | int | float | bool):
            kind = type(value).__name__
            raise ValueError(f"{owner} has {key} of type {kind}; Flower takes text, numbers, true and false.")
    return dict(config)


def _check_name(name: str, taken: Container[str]) -> None:
    if name in taken or name in (SUPERLINK, COMMAND):
        raise ValueError(f"a process is named {name!r} already; choose another name for the node.")


def run_local(
    config: Config, out: Path, parties: Path | None = None, insecure: bool = False, watch: Callable[[str], None] = print
) -> Mapping[str, Any]:
    """Runs a federation over a SuperLink and a SuperNode for each client, and returns its summary.

    Beside the files of a run, ``out`` has each process' log and each client's state, so that a run that was broken off
    is resumed by another call. ``ConfigError`` for a wrong configuration, ``ChildProcessError`` where the run or
    a process fails.
    """
    out = out.expanduser().absolute()
    configs = build_node_configs(config, out, parties)
    before = {path: path.stat().st_size for path in map(log_path, configs) if path.exists()}
    with tempfile.TemporaryDirectory(prefix="fedlora-") as place:
        app = write_app(Path(place) / "federation", config, out)
        with Loopback({f"client-{read_client(c)}": c for c in configs}, out / LOGS, insecure=insecure) as flower:
            watch(f"{len(configs)} parties are connected{'' if insecure else ', by TLS and with a key each'}.")
            failed = flower.run(app, watch=lambda line: watch(line) if _is_shown(line) else None)
        reasons = [reason for node in configs if (reason := _find_error(node, before))]
        if failed:
            why = "".join(f" {reason}" for reason in reasons)
            what = flower.outcome.rstrip(".")
            raise ChildProcessError(f"the run did not finish: {what}.{why} All other logs: {out / LOGS}.")
        for reason in reasons:
            watch(reason)
    return RunFolder(out).summary


def build_node_configs(config: Config, out: Path, parties: Path | None) -> list[dict[str, Any]]:
    """Each client's node configuration: its number, state folder, share of the processors, and its own settings."""
    count = config.clients.members
    tables = [{} for _ in range(count)] if parties is None else _read_tables(parties)
    if len(tables) != count:
        what = "clients.count less clients.new" if config.clients.new else "clients.count"
        raise ConfigError(f"{str(parties)!r} has {len(tables)} [[party]] tables, but {what} is {count}.")
    threads = config.engine.threads or max(1, (os.cpu_count() or 1) // count)
    found = []
    for client, own in enumerate(tables):
        base = {"client": client, "state": str(out / NODES / str(client)), "engine.threads": threads}
        found.append({**base, **own})
        apply_node_config(config.table, found[-1])  # a wrong key is an error before anything is started
    if sorted(map(read_client, found)) != list(range(count)):
        raise ConfigError(
            f"the parties are clients {sorted(map(read_client, found))}; each of 0 to {count - 1} is needed."
        )
    return found


def _find_error(node: Mapping[str, Any], before: Mapping[Path, int]) -> str:
    """The last error in a client's log since the run began; empty where there is none."""
    path = log_path(node)
    if not path.exists():
        return ""
    new = path.read_bytes()[before.get(path, 0) :].decode(errors="replace").splitlines()
    errors = [line for line in new if ERROR.match(line)]
    return (
        f"Client {read_client(node)}'s log, {path}, ends with {display_safe(errors[-1], LONGEST)!r}." if errors else ""
    )


def _read_tables(path: Path) -> list[dict[str, Any]]:
    try:
        table = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read as TOML: {error}; write a [[party]] table for each."
        ) from error
    return [_flatten(own) for own in table.get("party", [])]


def _flatten(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flatten(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _is_shown(line: str) -> bool:
    """Whether a line is the run's own, or an error; Flower's other lines are in the logs."""
    return line.startswith(("round ", "note: ")) or "ERROR" in line or "rror:" in line
