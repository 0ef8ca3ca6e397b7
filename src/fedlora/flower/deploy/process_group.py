"""Processes that are stopped together, with all that they start in turn, wherever those move.

Flower's servers start others (``flower-superexec``, and a ``flwr-serverapp`` or ``flwr-clientapp`` for each message),
some in sessions of their own. Each carries a mark in its environment, by which it is found on Linux, orphans too;
elsewhere the groups of those started here are stopped, and Flower's own watch over their parent ends the rest.
"""

import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

MARK = "FEDLORA_LOOPBACK"
PROCESSES = Path("/proc")
STEP = 0.05  # seconds between two looks


class Family:
    """Starts processes with a mark, finds them and their descendants, and leaves none."""

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
        return sorted(own | set(self._marked(member)))

    def stop(self, member: str | None = None, grace: float = 3.0) -> None:
        """Asks, then kills; returns when none is left."""
        self._send(member, signal.SIGTERM)
        if not self._gone(member, grace):
            self.kill(member)

    def kill(self, member: str | None = None) -> None:
        """Kills without asking, as a power cut would."""
        until = time.monotonic() + 10
        while self.alive(member) and time.monotonic() < until:
            self._send(member, signal.SIGKILL)
            self._gone(member, 4 * STEP)

    def _mark(self, member: str) -> str:
        return f"{self.token}:{member}:"

    def _marked(self, member: str | None) -> Iterator[int]:
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

    def _gone(self, member: str | None, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.alive(member):
            if time.monotonic() > until:
                return False
            time.sleep(STEP)
        return True


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def guarded() -> Callable[[], None]:
    """From now on SIGTERM and SIGHUP unwind the stack as Ctrl-C does; what is returned undoes that."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    return undo


@contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not cut the cleaning short."""
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
