"""A whole Flower deployment on this machine's loopback: a SuperLink, SuperNodes, TLS and registered node keys.

    with Loopback({"a": {"rows": "a.csv"}, "b": {"rows": "b.csv"}}, logs="logs") as flower:
        status = flower.run("app", {"rounds": 3})  # 0 where the run completed

Each node is a process with its own key, port and configuration, as on a machine of its own; everything is stopped when
the block is left, however it is left.
"""

import math
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomli_w

from fedlora.flower.deploy import certificates as certs
from fedlora.flower.deploy.control import COMMAND, CONNECTION, Control
from fedlora.flower.deploy.environment import HOST, answers, environment, plain, ports, scripts, tail
from fedlora.flower.deploy.process_group import Family, guarded, undisturbed

SUPERLINK = "superlink"
LAPSE = 70.0  # seconds; Flower holds a node for alive until two heartbeats, of 30 seconds, are due
ONLINE = re.compile(r"SuperNode ID: (\d+)")
Value = str | int | float | bool


class Loopback:
    """SuperLink and SuperNodes as processes; ``nodes`` maps each node's name to its node configuration.

    ``logs`` is where each process writes its log; ``certificates`` are those of ``certs.certificates`` with a key for
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
        self.configs = {name: _checked(f"the node {name!r}", config) for name, config in nodes.items()}
        for name in certs.party_names(list(self.configs)):
            _free(name, ())
        self.logs, self.insecure, self.deadline = Path(logs).absolute(), insecure, deadline
        self.certificates = None if certificates is None else Path(certificates).absolute()
        self.poll = poll
        self.ids: dict[str, int] = {}
        self.outcome = ""  # the last run's final status, in Flower's words

    def __enter__(self) -> "Loopback":
        self.scripts = scripts()
        self.folder = Path(tempfile.mkdtemp(prefix="fedlora-flower-"))
        self.family = Family(environment(self.folder / "home", self.scripts, self.poll))
        self.control = Control(self.family, self.scripts / COMMAND)
        self._undo = guarded()
        try:
            self._prepare()
            self._superlink()
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
        with undisturbed():
            self.family.stop()
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

        ``config`` overrides the app's own ``[tool.flwr.app.config]``, and may hold only keys that stand there. What
        became of the run stands in ``outcome``. After ``timeout`` seconds the run is stopped.
        """
        command = ["run", str(app), CONNECTION, "--stream"]
        if config:
            command += ["-c", str(self._toml(f"run-{len(self.family.started)}", _checked("the run", config)))]
        until = math.inf if timeout is None else time.monotonic() + timeout
        number, code, lines = self.control.stream(command, watch, timeout)
        if number is None:
            raise ChildProcessError(f"Flower did not start the run (exit status {code}): {tail(lines)}")
        self.outcome = self.control.finished(number, until)
        return 0 if self.outcome.startswith("finished:completed") else 1

    def nodes(self) -> dict[str, str]:
        """Each node's state as the SuperLink sees it: registered, online, offline or, where it has none, unknown.

        A node that was killed is offline only when two of its heartbeats are due, up to a minute later.
        """
        found = self.control.call("supernode", "list", CONNECTION)["nodes"]
        states = {int(node["node-id"]): node["status"] for node in found}
        return {name: states.get(self.ids.get(name, 0), "unknown") for name in self.configs}

    def add(self, name: str, config: Mapping[str, Value], register: bool = True) -> None:
        """One more node while the others are at work; its key is made where the certificates have none for it."""
        (name,) = certs.party_names([name])
        _free(name, self.configs)
        self.configs[name] = _checked(f"the node {name!r}", config)
        self.ports[name] = ports(1)[0]
        if not self.insecure and not (self.keys / "parties" / name).exists():
            certs.party(self.keys, name)
        if not self.insecure and register:
            self.register(name)
        self.start(name)

    def register(self, name: str) -> None:
        """Tells the SuperLink a node's public key."""
        answer = self.control.call("supernode", "register", f"{self._key(name)}.pub", CONNECTION)
        self.ids[name] = int(answer["node-id"])

    def start(self, name: str) -> None:
        """Starts a node (again), and returns when the SuperLink has it.

        The SuperLink refuses a key whose node it holds for alive: after a kill that is so for up to a minute.
        """
        self._known(name)
        if self.family.alive(name):
            raise ValueError(f"the node {name!r} runs already; kill it first.")
        until = time.monotonic() + LAPSE
        while not self.insecure and name in self.ids and self.nodes()[name] == "online" and time.monotonic() < until:
            time.sleep(1)
        self._wait({name: self._launch(name)})

    def kill(self, name: str) -> None:
        """SIGKILL to a node and all that it started, as a power cut would be."""
        self._known(name)
        self.family.kill(name)

    def stop(self, name: str) -> None:
        """Stops a node in order: it signs off, is offline at once, and may start again at once."""
        self._known(name)
        self.family.stop(name)

    def restart_superlink(self) -> None:
        """Stops the SuperLink and starts it with the same database and port; the nodes find it again."""
        self.family.stop(SUPERLINK)
        self._superlink()

    def _key(self, name: str) -> Path:
        return self.keys / "parties" / name / f"{name}.key"

    def _known(self, name: str) -> None:
        if name not in self.configs:
            raise ValueError(f"no node is named {name!r}; there are {', '.join(self.configs)}.")

    def _prepare(self) -> None:
        """Ports, keys, logs and what ``flwr`` reads."""
        self.logs.mkdir(parents=True, exist_ok=True)
        first, *rest = ports(1 + len(self.configs))
        self.port, self.ports = first, dict(zip(self.configs, rest, strict=True))
        self.keys = self.certificates or self.folder / "certificates"
        if not self.insecure:
            self._certified()
        trust = {"insecure": True} if self.insecure else {"root-certificates": str(self.keys / "ca.crt")}
        table = {"default": CONNECTION, CONNECTION: {"address": f"{HOST}:{self.port}", **trust}}
        home = self.folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": table}))

    def _certified(self) -> None:
        """A key for each node: made here, or those of the folder that was named."""
        if self.certificates is None:
            certs.certificates(self.keys, list(self.configs), [HOST, "localhost"])
        elif lost := [name for name in self.configs if not self._key(name).is_file()]:
            raise ValueError(f"{str(self.keys)!r} has no key for {', '.join(lost)}; make one with certs.party.")

    def _superlink(self) -> None:
        server = self.keys / "server"
        tls = [
            "--ssl-ca-certfile", str(server / "ca.crt"), "--ssl-certfile", str(server / "server.pem"),
            "--ssl-keyfile", str(server / "server.key"), "--enable-supernode-auth",
        ]  # fmt: skip
        own = ["--host", HOST, "--port", str(self.port), "--database", str(self.folder / "state.db")]
        command = ["flower-superlink", *(["--insecure"] if self.insecure else tls), *own]
        process, _ = self._logged(SUPERLINK, command)
        self._until(SUPERLINK, process, lambda: answers(self.port), "did not listen")

    def _launch(self, name: str) -> tuple[subprocess.Popen, int]:
        key = str(self._key(name))
        ca = str(self._key(name).parent / "ca.crt")
        secure = ["--root-certificates", ca, "--auth-supernode-private-key", key]
        own = ["--superlink", f"{HOST}:{self.port}", "--host", HOST, "--port", str(self.ports[name])]
        if self.configs[name]:
            own += ["--node-config", str(self._toml(f"node-{name}", self.configs[name]))]
        command = ["flower-supernode", *(["--insecure"] if self.insecure else secure), *own]
        return self._logged(name, command, env={"FLWR_HOME": str(self.folder / f"home-{name}")})

    def _logged(self, name: str, command: list[str], **options) -> tuple[subprocess.Popen, int]:
        """A process and the place in its log where it begins: a second start is written after the first."""
        with (self.logs / f"{name}.log").open("ab") as log:
            place = log.tell()
            command[0] = str(self.scripts / command[0])
            return self.family.start(name, command, stdout=log, stderr=subprocess.STDOUT, **options), place

    def _wait(self, launched: dict[str, tuple[subprocess.Popen, int]]) -> None:
        """Until each node has its number from the SuperLink."""
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
                self.family.stop(name)
                lines = tail(self._log(name).splitlines())
                raise ChildProcessError(f"{name} {how}; its log, {self.logs / name}.log, ends: {lines}")
            time.sleep(0.1)

    def _log(self, name: str, place: int = 0) -> str:
        return plain((self.logs / f"{name}.log").read_bytes()[place:].decode(errors="replace"))

    def _toml(self, name: str, config: Mapping[str, Value]) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(config))
        return path


def _checked(whose: str, config: Mapping[str, Value]) -> dict[str, Value]:
    for key, value in config.items():
        if not isinstance(value, str | int | float | bool):
            kind = type(value).__name__
            raise ValueError(f"{whose} has {key} of type {kind}; Flower takes text, numbers, true and false.")
    return dict(config)


def _free(name: str, taken: Container[str]) -> None:
    if name in taken or name in (SUPERLINK, COMMAND):
        raise ValueError(f"a process is named {name!r} already; choose another name for the node.")
