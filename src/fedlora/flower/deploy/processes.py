"""Processes on this machine: their environment and logs, groups that end together, and the ``flwr`` command.

Flower's servers start other processes (``flower-superexec``, and a ``flwr-serverapp`` or ``flwr-clientapp`` for each
message), some in their own sessions. Each has a mark in its environment, by which it is found on Linux, even without a
parent. Elsewhere, the process groups of the servers are stopped, and Flower ends the other processes with their parent.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import fedlora

HOST = "127.0.0.1"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # a terminal's escape sequence for a colour
LAST = 12  # lines of a log in an error message
FRAME = re.compile(r"\s+\S.*|Traceback \(most recent call last\):|KeyboardInterrupt|During handling of .*|The above .*")
MARK = "FEDLORA_LOOPBACK"
STEP = 0.05  # seconds between two checks
CONNECTION = "loopback"  # the name of the SuperLink in Flower's own config.toml
COMMAND = "flwr"
AWAY = 30.0  # seconds that a SuperLink may be unreachable before the run's end
STARTED = re.compile(r"Successfully started run (\d+)")


def find_commands() -> Path:
    """Return the folder with the Flower commands of this Python interpreter."""
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        if shutil.which("flower-superlink", path=folder):
            return Path(folder)
    raise ValueError("Flower's commands are not installed with this Python; run `pip install 'fedlora[flower]'`.")


def build_environment(home: Path, commands: Path, poll: float) -> dict[str, str]:
    """Return the environment of the processes, in which Flower finds its commands and an app imports this fedlora."""
    source = str(Path(fedlora.__file__).parents[1])
    installed = source in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = list(dict.fromkeys([*paths, *([] if installed else [source])]))
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy")), HOST, "localhost"]))
    return {
        **os.environ,
        **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}),
        "PATH": os.pathsep.join([str(commands), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll), "NO_PROXY": direct, "no_proxy": direct,
        "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TERMINAL_WIDTH": "1000",
    }  # fmt: skip


def find_free_ports(count: int) -> list[int]:
    """Return free ports. All are bound at once, so that no port is returned twice."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def is_listening(port: int) -> bool:
    """Whether a process listens on the port."""
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex((HOST, port)) == 0


def tail(lines: list[str]) -> str:
    """Return the last lines of a log; without INFO lines and frames of tracebacks, if there are other lines."""
    filled = [line for line in lines if not re.fullmatch(r"\s*|\s*[╭╰].*", line)]
    serious = [line for line in filled if not line.startswith("INFO")]
    reasons = [line for line in serious if not FRAME.fullmatch(line)]
    return " | ".join(line.strip("│ \t") for line in (reasons or serious or filled)[-LAST:]) or "(nothing)"


class ProcessGroup:
    """Starts processes with a mark, finds them and their descendants, and ends them all."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)
        self.token = secrets.token_hex(8)
        self.started: list[tuple[str, subprocess.Popen]] = []

    def start(self, member: str, command: list[str], **options: Any) -> subprocess.Popen:
        """Start one process under a member's name; ``options`` are those of ``Popen``."""
        environment = {**self.environment, **options.pop("env", {}), MARK: f"{self.token}:{member}:"}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **options
        )
        self.started.append((member, process))
        return process

    def alive(self, member: str | None = None) -> list[int]:
        """Return the ids of a member's running processes, or of all, including their descendants."""
        pids = {process.pid for name, process in self.started if process.poll() is None and member in (None, name)}
        mark = f"{MARK}={self.token}:{'' if member is None else member + ':'}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or belongs to another user
                if any(entry.startswith(mark) for entry in (folder / "environ").read_bytes().split(b"\0")):
                    pids.add(int(folder.name))
        return sorted(pids)

    def stop(self, member: str | None = None, grace: float = 3.0) -> None:
        """Terminate the processes, and kill those that remain after ``grace`` seconds."""
        self._send(member, signal.SIGTERM)
        if not self._wait_for_end(member, grace):
            self.kill(member)

    def kill(self, member: str | None = None) -> None:
        """Kill the processes without terminating them first, which has the effect of a power cut."""
        until = time.monotonic() + 10
        while self.alive(member) and time.monotonic() < until:
            self._send(member, signal.SIGKILL)
            self._wait_for_end(member, 4 * STEP)

    def _send(self, member: str | None, number: signal.Signals) -> None:
        leaders = {process.pid for _, process in self.started}
        for pid in self.alive(member):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number) if pid in leaders else os.kill(pid, number)

    def _wait_for_end(self, member: str | None, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.alive(member):
            if time.monotonic() > until:
                return False
            time.sleep(STEP)
        return True


def raise_exit(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal by unwinding the stack, as Ctrl-C does."""
    raise SystemExit(128 + number)


class FlwrCommand:
    """The ``flwr`` command: each call is one process of the group, which answers in JSON."""

    def __init__(self, group: ProcessGroup, program: Path):
        self.group, self.program = group, program

    def stream(
        self, arguments: list[str], watch: Callable[[str], None], timeout: float | None
    ) -> tuple[int | None, int, list[str]]:
        """Return the run's number, the exit status of ``flwr run``, and its last lines; ``watch`` gets every line."""
        number, lines = None, []
        process = self._start(*arguments)
        timer = threading.Timer(timeout or 0, process.terminate)
        if timeout is not None:
            timer.start()
        try:
            for raw in process.stdout:
                line = COLOUR.sub("", raw.rstrip("\r\n"))
                lines = [*lines[-LAST:], line]
                if number is None and (match := STARTED.search(line)):
                    number = int(match[1])
                watch(line)
        finally:
            timer.cancel()
            process.stdout.close()
        return number, process.wait(), lines

    def wait_for_end(self, number: int, until: float) -> str:
        """Wait for the run's final status, and return it. The log's stream may end before the run does."""
        while not (run := self._find_run(number))["status"].startswith("finished"):
            if time.monotonic() >= until:
                with suppress(ChildProcessError):  # the run may finish meanwhile
                    self.call("stop", str(number), CONNECTION)
            time.sleep(0.5)
        details = run["status-details"]
        return run["status"] if details in ("", "N/A") else f"{run['status']}: {details}"

    def _find_run(self, number: int) -> dict[str, str]:
        """Return the run's entry in Flower's list. A SuperLink that restarts may take ``AWAY`` seconds to answer."""
        until = time.monotonic() + AWAY
        while True:
            try:
                return self.call("list", CONNECTION, "--run-id", str(number))["runs"][0]
            except ChildProcessError:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _start(self, *arguments: str, stderr: int = subprocess.STDOUT) -> subprocess.Popen:
        command, pipe = [str(self.program), *arguments], subprocess.PIPE
        return self.group.start(
            COMMAND, command, text=True, encoding="utf-8", errors="replace", stdout=pipe, stderr=stderr
        )

    def call(self, *arguments: str) -> dict:
        """Run a ``flwr`` command, and return its answer."""
        with self._start(*arguments, "--format", "json", stderr=subprocess.PIPE) as process:
            output, errors = process.communicate()
        answer: dict = {}
        with suppress(ValueError):  # no JSON
            answer = json.loads(output[output.index("{") :])
        if not answer.get("success"):
            why = answer.get("error-message") or tail((output + errors).splitlines())
            raise ChildProcessError(f"`flwr {' '.join(arguments)}` failed: {' '.join(why.split())}")
        return answer
