"""Processes on this machine: their environment and logs, groups that end together, and the ``flwr`` command.

Flower's servers start others (``flower-superexec``, and a ``flwr-serverapp`` or ``flwr-clientapp`` for each message),
some in sessions of their own. Each carries a mark in its environment, by which it is found on Linux, orphans too;
elsewhere the groups of those started here are stopped, and Flower's own watch over their parent ends the rest.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import fedlora

HOST = "127.0.0.1"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LAST = 12  # lines of a log that an error shows
FRAME = re.compile(r"\s+\S.*|Traceback \(most recent call last\):|KeyboardInterrupt|During handling of .*|The above .*")
MARK = "FEDLORA_LOOPBACK"
PROCESSES = Path("/proc")
STEP = 0.05  # seconds between two looks
CONNECTION = "loopback"  # the name of the SuperLink in Flower's own config.toml
COMMAND = "flwr"
AWAY = 30.0  # seconds that a SuperLink may be unreachable while a run's end is waited for
STARTED = re.compile(r"Successfully started run (\d+)")


def find_commands() -> Path:
    """The folder with Flower's commands, which is that of this interpreter's."""
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        if shutil.which("flower-superlink", path=folder):
            return Path(folder)
    raise ValueError("Flower's commands are not installed with this Python; run `pip install 'fedlora[flower]'`.")


def build_environment(home: Path, commands: Path, poll: float) -> dict[str, str]:
    """The processes' environment: Flower finds its own commands by PATH, and an app must find this fedlora."""
    own = str(Path(fedlora.__file__).parents[1])
    installed = own in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    known = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy")), HOST, "localhost"]))
    places = dict.fromkeys([*known, *([] if installed else [own])])
    return {
        **os.environ,
        **({"PYTHONPATH": os.pathsep.join(places)} if places else {}),
        "PATH": os.pathsep.join([str(commands), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll), "NO_PROXY": direct, "no_proxy": direct,
        "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TERMINAL_WIDTH": "1000",
    }  # fmt: skip


def find_free_ports(count: int) -> list[int]:
    """Ports that are free, held all at once so that none comes twice."""
    held = [socket.create_server((HOST, 0)) for _ in range(count)]
    free = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return free


def is_listening(port: int) -> bool:
    """Whether a process listens on the port."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def strip_colours(text: str) -> str:
    """Removes a terminal's colours."""
    return COLOUR.sub("", text)


def tail(lines: list[str]) -> str:
    """The last lines of a log, without chatter and the frames of tracebacks where other lines are there."""
    filled = [line for line in lines if not re.fullmatch(r"\s*|\s*[╭╰].*", line)]
    grave = [line for line in filled if not line.startswith("INFO")]
    reasons = [line for line in grave if not FRAME.fullmatch(line)]
    return " | ".join(line.strip("│ \t") for line in (reasons or grave or filled)[-LAST:]) or "(nothing)"


class ProcessGroup:
    """Starts processes with a mark, finds them and their descendants, and ends them all."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)
        self.token = secrets.token_hex(8)
        self.started: list[tuple[str, subprocess.Popen]] = []

    def start(self, member: str, command: list[str], **options) -> subprocess.Popen:
        """One process under a member's name; ``options`` are Popen's."""
        environment = {**self.environment, **options.pop("env", {}), MARK: self._mark(member)}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **options
        )
        self.started.append((member, process))
        return process

    def alive(self, member: str | None = None) -> list[int]:
        """The processes of one member, or of all, with those that they started."""
        own = {process.pid for name, process in self.started if process.poll() is None and member in (None, name)}
        return sorted(own | set(self._find_marked(member)))

    def stop(self, member: str | None = None, grace: float = 3.0) -> None:
        """Asks, then kills; returns when none is left."""
        self._send(member, signal.SIGTERM)
        if not self._wait_for_end(member, grace):
            self.kill(member)

    def kill(self, member: str | None = None) -> None:
        """Kills without asking, as a power cut would."""
        until = time.monotonic() + 10
        while self.alive(member) and time.monotonic() < until:
            self._send(member, signal.SIGKILL)
            self._wait_for_end(member, 4 * STEP)

    def _mark(self, member: str) -> str:
        return f"{self.token}:{member}:"

    def _find_marked(self, member: str | None) -> Iterator[int]:
        mark = f"{MARK}={self.token}:{'' if member is None else member + ':'}".encode()
        for folder in PROCESSES.glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile, or another user's
                if any(entry.startswith(mark) for entry in (folder / "environ").read_bytes().split(b"\0")):
                    yield int(folder.name)

    def _send(self, member: str | None, number: signal.Signals) -> None:
        own = {process.pid for _, process in self.started}
        for pid in self.alive(member):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number) if pid in own else os.kill(pid, number)

    def _wait_for_end(self, member: str | None, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.alive(member):
            if time.monotonic() > until:
                return False
            time.sleep(STEP)
        return True


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def unwind_on_signals() -> Callable[[], None]:
    """Lets SIGTERM and SIGHUP unwind the stack as Ctrl-C does. Returns a function that undoes this."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    return undo


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignores signals meanwhile, so that a second Ctrl-C does not cut the cleaning short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class FlwrCommand:
    """The ``flwr`` command: one process of the group a question, JSON as its answer."""

    def __init__(self, group: ProcessGroup, program: Path):
        self.group, self.program = group, program

    def stream(
        self, arguments: list[str], watch: Callable[[str], None], timeout: float | None
    ) -> tuple[int | None, int, list[str]]:
        """Returns the run's number, the exit status of ``flwr run``, and its last lines; ``watch`` gets every line."""
        number, lines = None, []
        process = self._flwr(*arguments)
        timer = threading.Timer(timeout or 0, process.terminate)
        if timeout is not None:
            timer.start()
        try:
            for raw in process.stdout:
                line = strip_colours(raw.rstrip("\r\n"))
                lines = [*lines[-LAST:], line]
                if number is None and (found := STARTED.search(line)):
                    number = int(found[1])
                watch(line)
        finally:
            timer.cancel()
            process.stdout.close()
        return number, process.wait(), lines

    def wait_for_end(self, number: int, until: float) -> str:
        """Waits for the run's final status; the log's stream may end before the run does."""
        while not (run := self._state(number))["status"].startswith("finished"):
            if time.monotonic() >= until:
                with suppress(ChildProcessError):  # it may finish meanwhile
                    self.call("stop", str(number), CONNECTION)
            time.sleep(0.5)
        details = run["status-details"]
        return run["status"] if details in ("", "N/A") else f"{run['status']}: {details}"

    def _state(self, number: int) -> dict[str, str]:
        """The run's entry in Flower's list. A SuperLink that is being restarted is given time to come back."""
        until = time.monotonic() + AWAY
        while True:
            try:
                return self.call("list", CONNECTION, "--run-id", str(number))["runs"][0]
            except ChildProcessError:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _flwr(self, *arguments: str, **options) -> subprocess.Popen:
        command = [str(self.program), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        return self.group.start(COMMAND, command, text=True, encoding="utf-8", errors="replace", **pipes)

    def call(self, *arguments: str) -> dict:
        """Runs a ``flwr`` command, and returns its answer."""
        with self._flwr(*arguments, "--format", "json", stderr=subprocess.PIPE) as process:
            answer, words = process.communicate()
        found = _parse_json(answer)
        if not found.get("success"):
            what = found.get("error-message") or tail((answer + words).splitlines())
            raise ChildProcessError(f"`flwr {' '.join(arguments)}` failed: {' '.join(what.split())}")
        return found


def _parse_json(text: str) -> dict:
    start = text.find("{")
    try:
        return json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
