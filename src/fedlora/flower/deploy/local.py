"""A whole Flower deployment on this machine: a SuperLink, SuperNodes, TLS and registered node keys.

    with Loopback({"a": {"rows": "a.csv"}, "b": {"rows": "b.csv"}}, logs="logs") as flower:
        status = flower.run("app", {"rounds": 3})  # 0 if the run completed

Each node is a process with its own key, port and configuration, as on a machine of its own. All processes are stopped
when the block is left. ``run_local`` starts a deployment for a federation and runs it.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.flower.deploy.app_template import write_app
from fedlora.flower.deploy.certificates import add_party, check_party_names, create_certificates
from fedlora.flower.deploy.client_process import log_path
from fedlora.flower.deploy.node_config import apply_node_config, read_client
from fedlora.flower.deploy.processes import (
    COLOUR,
    COMMAND,
    CONNECTION,
    HOST,
    FlwrCommand,
    ProcessGroup,
    build_environment,
    find_commands,
    find_free_ports,
    is_listening,
    raise_exit,
    tail,
)
from fedlora.runs.config import Config
from fedlora.runs.folder import RunFolder
from fedlora.runs.interrupt import handle_signals
from fedlora.schema import ConfigError, flatten_table, read_table
from fedlora.text import display_safe

SUPERLINK = "superlink"
LAPSE = 70.0  # seconds after which Flower regards a killed node as offline: two heartbeats of 30 seconds
ONLINE = re.compile(r"SuperNode ID: (\d+)")
Value = str | int | float | bool
ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")  # the beginning of the last line of a traceback
LONGEST = 500  # characters of a quoted error


class Loopback:
    """SuperLink and SuperNodes as processes; ``nodes`` maps each node's name to its node configuration.

    Each process writes its log to the folder ``logs``. ``certificates`` is a folder of ``create_certificates`` with a
    key for each node; without it, new certificates are created. ``poll`` is the interval at which Flower's executors
    look for work, and ``deadline`` the time for a process to start, in seconds.
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
        self.configs: dict[str, dict[str, Value]] = {}
        for name, config in nodes.items():
            self._add_config(name, config)
        check_party_names(list(nodes))
        self.logs, self.insecure, self.deadline, self.poll = Path(logs).absolute(), insecure, deadline, poll
        self.certificates = None if certificates is None else Path(certificates).absolute()
        self.ids: dict[str, int] = {}
        self.outcome = ""  # the last run's final status, as reported by Flower

    def __enter__(self) -> "Loopback":
        self.commands = find_commands()
        self.folder = Path(tempfile.mkdtemp(prefix="fedlora-flower-"))
        self.group = ProcessGroup(build_environment(self.folder / "home", self.commands, self.poll))
        self.flwr = FlwrCommand(self.group, self.commands / COMMAND)
        self._signals = ExitStack()
        self._signals.enter_context(handle_signals(raise_exit, signal.SIGTERM, signal.SIGHUP))
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
        """Stop every process and remove the temporary folder; the logs stay."""
        with handle_signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second Ctrl-C
            self.group.stop()
            shutil.rmtree(self.folder, ignore_errors=True)
        self._signals.close()

    def run(
        self,
        app: str | Path,
        config: Mapping[str, Value] | None = None,
        watch: Callable[[str], None] = print,
        timeout: float | None = None,
    ) -> int:
        """Run an app's folder, and pass each line of its log to ``watch``. Returns 0 if it completed, and 1 otherwise.

        ``config`` overrides values of the app's ``[tool.flwr.app.config]``. The run's final status is ``outcome``.
        After ``timeout`` seconds the run is stopped.
        """
        command = ["run", str(app), CONNECTION, "--stream"]
        if config:
            path = self._write_toml(f"run-{len(self.group.started)}", _check_values("the run", config))
            command += ["-c", str(path)]
        until = math.inf if timeout is None else time.monotonic() + timeout
        number, code, lines = self.flwr.stream(command, watch, timeout)
        if number is None:
            raise ChildProcessError(f"Flower did not start the run (exit status {code}): {tail(lines)}")
        self.outcome = self.flwr.wait_for_end(number, until)
        return 0 if self.outcome.startswith("finished:completed") else 1

    def nodes(self) -> dict[str, str]:
        """Return each node's state in the SuperLink: registered, online or offline, or unknown if it has none.

        A node that was killed becomes offline after two missed heartbeats, up to a minute later.
        """
        nodes = self.flwr.call("supernode", "list", CONNECTION)["nodes"]
        states = {int(node["node-id"]): node["status"] for node in nodes}
        return {name: states.get(self.ids.get(name, 0), "unknown") for name in self.configs}

    def add(self, name: str, config: Mapping[str, Value], register: bool = True) -> None:
        """Add one more node to a running deployment. Its key is created if the certificates have none for it."""
        check_party_names([name])
        self._add_config(name, config)
        self.ports[name] = find_free_ports(1)[0]
        if not self.insecure and not (self.keys / "parties" / name).exists():
            add_party(self.keys, name)
        if not self.insecure and register:
            self.register(name)
        self.start(name)

    def register(self, name: str) -> None:
        """Register a node's public key with the SuperLink."""
        answer = self.flwr.call("supernode", "register", f"{self._key(name)}.pub", CONNECTION)
        self.ids[name] = int(answer["node-id"])

    def start(self, name: str) -> None:
        """Start a node, and return when the SuperLink has admitted it.

        The SuperLink refuses the key of a node that it regards as online, up to a minute after the node was killed.
        """
        self._check_name(name)
        if self.group.alive(name):
            raise ValueError(f"the node {name!r} runs already; kill it first.")
        until = time.monotonic() + LAPSE
        while not self.insecure and name in self.ids and self.nodes()[name] == "online" and time.monotonic() < until:
            time.sleep(1)
        self._wait({name: self._launch(name)})

    def kill(self, name: str) -> None:
        """Send SIGKILL to a node and its child processes, which has the effect of a power cut."""
        self._check_name(name)
        self.group.kill(name)

    def stop(self, name: str) -> None:
        """Stop a node gracefully: it is offline at once, and may be started again at once."""
        self._check_name(name)
        self.group.stop(name)

    def restart_superlink(self) -> None:
        """Stop the SuperLink and start it with the same database and port; the nodes reconnect."""
        self.group.stop(SUPERLINK)
        self._start_superlink()

    def _key(self, name: str) -> Path:
        return self.keys / "parties" / name / f"{name}.key"

    def _add_config(self, name: str, config: Mapping[str, Value]) -> None:
        if name in self.configs or name in (SUPERLINK, COMMAND):
            raise ValueError(f"a process is named {name!r} already; choose another name for the node.")
        self.configs[name] = _check_values(f"the node {name!r}", config)

    def _check_name(self, name: str) -> None:
        if name not in self.configs:
            raise ValueError(f"no node is named {name!r}; there are {', '.join(self.configs)}.")

    def _prepare(self) -> None:
        """Prepare ports, keys, logs and the configuration of ``flwr``."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.port, *ports = find_free_ports(1 + len(self.configs))
        self.ports = dict(zip(self.configs, ports, strict=True))
        self.keys = self.certificates or self.folder / "certificates"
        trust: dict[str, Any] = {"insecure": True}
        if not self.insecure:
            trust = {"root-certificates": str(self.keys / "ca.crt")}
            if self.certificates is None:
                create_certificates(self.keys, list(self.configs), [HOST, "localhost"])
            elif missing := [name for name in self.configs if not self._key(name).is_file()]:
                raise ValueError(
                    f"{str(self.keys)!r} has no key for {', '.join(missing)}; make one with certificates.add_party."
                )
        table = {"default": CONNECTION, CONNECTION: {"address": f"{HOST}:{self.port}", **trust}}
        home = self.folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": table}))

    def _start_superlink(self) -> None:
        server = self.keys / "server"
        tls = [
            "--ssl-ca-certfile", str(server / "ca.crt"), "--ssl-certfile", str(server / "server.pem"),
            "--ssl-keyfile", str(server / "server.key"), "--enable-supernode-auth",
        ]  # fmt: skip
        options = ["--host", HOST, "--port", str(self.port), "--database", str(self.folder / "state.db")]
        process, _ = self._start(SUPERLINK, "flower-superlink", tls, options)
        self._wait_until(SUPERLINK, process, lambda: is_listening(self.port), "did not listen")

    def _launch(self, name: str) -> tuple[subprocess.Popen, int]:
        key = self._key(name)
        tls = ["--root-certificates", str(key.parent / "ca.crt"), "--auth-supernode-private-key", str(key)]
        options = ["--superlink", f"{HOST}:{self.port}", "--host", HOST, "--port", str(self.ports[name])]
        if self.configs[name]:
            options += ["--node-config", str(self._write_toml(f"node-{name}", self.configs[name]))]
        home = {"FLWR_HOME": str(self.folder / f"home-{name}")}
        return self._start(name, "flower-supernode", tls, options, env=home)

    def _wait(self, launched: dict[str, tuple[subprocess.Popen, int]]) -> None:
        """Wait until each node has its number from the SuperLink."""
        for name, (process, size) in launched.items():

            def is_online(name: str = name, size: int = size) -> bool:
                if match := ONLINE.search(self._log(name, size)):
                    self.ids[name] = int(match[1])
                return bool(match)

            self._wait_until(name, process, is_online, "was not admitted by the SuperLink")

    def _start(
        self, name: str, program: str, tls: list[str], options: list[str], **popen: Any
    ) -> tuple[subprocess.Popen, int]:
        """Start a process. Returns it and the present size of its log, which may have lines of an earlier process."""
        command = [str(self.commands / program), *(["--insecure"] if self.insecure else tls), *options]
        with (self.logs / f"{name}.log").open("ab") as log:
            return self.group.start(name, command, stdout=log, stderr=subprocess.STDOUT, **popen), log.tell()

    def _wait_until(self, name: str, process: subprocess.Popen, is_ready: Callable[[], bool], failure: str) -> None:
        until = time.monotonic() + self.deadline
        while not is_ready():
            if (code := process.poll()) is not None or time.monotonic() > until:
                how = f"ended with status {code}" if code is not None else f"{failure} within {self.deadline:g} seconds"
                self.group.stop(name)
                lines = tail(self._log(name).splitlines())
                raise ChildProcessError(f"{name} {how}; its log, {self.logs / name}.log, ends: {lines}")
            time.sleep(0.1)

    def _log(self, name: str, start: int = 0) -> str:
        return COLOUR.sub("", (self.logs / f"{name}.log").read_bytes()[start:].decode(errors="replace"))

    def _write_toml(self, name: str, config: Mapping[str, Value]) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(config))
        return path


def _check_values(owner: str, config: Mapping[str, Value]) -> dict[str, Value]:
    for key, value in config.items():
        if not isinstance(value, str | int | float | bool):
            kind = type(value).__name__
            raise ValueError(f"{owner} has {key} of type {kind}; Flower takes text, numbers, true and false.")
    return dict(config)


def run_local(
    config: Config, out: Path, parties: Path | None = None, insecure: bool = False, watch: Callable[[str], None] = print
) -> Mapping[str, Any]:
    """Run a federation over a SuperLink and a SuperNode for each client, and return its summary.

    Beside the files of a run, ``out`` has each process's log and each client's state, so that another call resumes an
    interrupted run. Raises ``ConfigError`` for a wrong configuration, and ``ChildProcessError`` if the run or a process
    fails.
    """
    out = out.expanduser().absolute()
    configs = build_node_configs(config, out, parties)
    sizes = {path: path.stat().st_size for path in map(log_path, configs) if path.exists()}

    def show(line: str) -> None:  # Flower's other lines are in the logs only
        if line.startswith(("round ", "note: ")) or "ERROR" in line or "rror:" in line:
            watch(line)

    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder:
        app = write_app(Path(folder) / "federation", config, out)
        with Loopback({f"client-{read_client(c)}": c for c in configs}, out / "logs", insecure=insecure) as flower:
            watch(f"{len(configs)} parties are connected{'' if insecure else ', by TLS and with a key each'}.")
            failed = flower.run(app, watch=show)
        reasons = [reason for node in configs if (reason := _find_error(node, sizes))]
        if failed:
            why = "".join(f" {reason}" for reason in reasons)
            raise ChildProcessError(
                f"the run did not finish: {flower.outcome.rstrip('.')}.{why} All other logs: {out / 'logs'}."
            )
        for reason in reasons:
            watch(reason)
    return RunFolder(out).summary


def build_node_configs(config: Config, out: Path, parties: Path | None) -> list[dict[str, Any]]:
    """Return each client's node configuration: number, state folder, share of the processors, and its own settings."""
    count = config.clients.members
    tables = [{} for _ in range(count)] if parties is None else read_table(parties).get("party", [])
    if len(tables) != count:
        setting = "clients.count less clients.new" if config.clients.new else "clients.count"
        raise ConfigError(f"{str(parties)!r} has {len(tables)} [[party]] tables, but {setting} is {count}.")
    threads = config.engine.threads or max(1, (os.cpu_count() or 1) // count)
    nodes = []
    for client, table in enumerate(tables):
        base = {"client": client, "state": str(out / "nodes" / str(client)), "engine.threads": threads}
        nodes.append({**base, **flatten_table(table)})
        apply_node_config(config.table, nodes[-1])  # reports a wrong key before anything is started
    numbers = sorted(map(read_client, nodes))
    if numbers != list(range(count)):
        raise ConfigError(f"the parties are clients {numbers}; each of 0 to {count - 1} is needed.")
    return nodes


def _find_error(node: Mapping[str, Any], sizes: Mapping[Path, int]) -> str:
    """Return a sentence on the last error in a client's log after its first ``sizes[log]`` bytes, or nothing."""
    path = log_path(node)
    new = path.read_bytes()[sizes.get(path, 0) :] if path.exists() else b""
    errors = [line for line in new.decode(errors="replace").splitlines() if ERROR.match(line)]
    if not errors:
        return ""
    return f"Client {read_client(node)}'s log, {path}, ends with {display_safe(errors[-1], LONGEST)!r}."
