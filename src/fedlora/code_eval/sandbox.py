"""Runs one Python program so that it can hurt nothing: no network, no files but its own, bounded in everything.

Nothing runs unprotected: a machine that cannot confine a program gets ``SandboxError`` and not a verdict.
"""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO

from fedlora.code_eval import folder

SCRIPT = Path(__file__).with_name("inside.py")
LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/nix/store", "/usr/share/zoneinfo",
             "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")  # fmt: skip
LINKER = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if os.environ.get(key)}  # some interpreters need it
TICK = 0.05  # seconds between looks at the clock and at the folder
ENTRIES = 1000  # files and folders that a program may make
MIB = 2**20


class SandboxError(ValueError):
    """This machine cannot confine a program, so none was run."""


@dataclass(frozen=True)
class Ran:
    """How a program ended: ``ok`` only where it and all its tests ran to their end."""

    ok: bool
    output: str  # stdout and stderr together
    why: str  # one line where it is not ok
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """What a program may use. Processor time counts; the clock is only for those that sleep."""

    seconds: int = 10  # of processor time
    wall_seconds: float = 60.0
    memory_mb: int = 512  # address space
    disk_mb: int = 16  # the largest file, and all files together
    output_kb: int = 256

    def __post_init__(self):
        for key in ("seconds", "wall_seconds", "memory_mb", "disk_mb", "output_kb"):
            if not getattr(self, key) > 0:
                raise ValueError(f"a sandbox's {key} is {getattr(self, key)}; it must be above 0.")

    def ready(self) -> None:
        """``SandboxError`` where this machine cannot confine a program; tried once, by what must be refused."""
        probe()

    def run(self, program: str, tests: str = "", stopped: Callable[[], bool] = lambda: False) -> Ran:
        """Runs ``program`` and then, in the same namespace, ``tests``; ends early once ``stopped``.

        ``SandboxError`` as ``ready``.
        """
        self.ready()
        return self._run(program, tests, stopped)

    def _run(self, program: str, tests: str, stopped: Callable[[], bool] = lambda: False) -> Ran:
        token, began = secrets.token_hex(16), time.monotonic()
        task = {**self._task(), "program": program, "tests": tests, "token": token}
        with folder.fresh() as own, tempfile.TemporaryFile() as request:
            request.write(json.dumps(task).encode())
            request.seek(0)
            process, seen = self._run_script(own, request, stopped)
        return self._judge(process, seen, token, time.monotonic() - began)

    def _task(self) -> dict:
        limits = {"cpu": self.seconds, "memory": self.memory_mb * MIB, "file": self.disk_mb * MIB, "descriptors": 64}
        return {"readable": readable(), "packages": packages(), "limits": limits, "parent": os.getpid()}

    def _run_script(
        self, own: str, request: IO[bytes], stopped: Callable[[], bool]
    ) -> tuple[subprocess.Popen, "_Seen"]:
        """Starts the script, watches it, and returns once it has ended or was killed."""
        verdict, answers = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", str(SCRIPT), str(answers)],
                stdin=request, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=own, pass_fds=(answers,),
                env={**LINKER, "HOME": own, "TMPDIR": own, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
                     "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(answers)
        with os.fdopen(verdict, "rb", 0) as pipe, process:
            try:
                names = {process.stdout.fileno(): "output", pipe.fileno(): "answer"}
                return process, self._watch(process, own, names, stopped)
            finally:
                process.kill()

    def _watch(
        self, process: subprocess.Popen, own: str, names: dict[int, str], stopped: Callable[[], bool]
    ) -> "_Seen":
        """Reads what comes until the program is dead or a bound is broken that no kernel watches."""
        seen, now = _Seen(), time.monotonic()
        end, look = now + self.wall_seconds, now
        with selectors.DefaultSelector() as selector:
            for descriptor in names:
                selector.register(descriptor, selectors.EVENT_READ)
            while not seen.over and (selector.get_map() or process.poll() is None):
                for key, _ in selector.select(TICK):
                    chunk = os.read(key.fd, 65536)
                    getattr(seen, names[key.fd]).extend(chunk)
                    if not chunk:
                        selector.unregister(key.fd)
                now = time.monotonic()
                late = f"ran longer than {self.wall_seconds:g} s" if now > end else "was stopped" if stopped() else ""
                seen.over = late or self._loud(seen) or (self._full(own) if now > look else "")
                look = now + TICK if now > look else look
        return seen

    def _loud(self, seen: "_Seen") -> str:
        loud = len(seen.output) > self.output_kb * 1024 or len(seen.answer) > 4096
        return f"wrote more than {self.output_kb} kB of output" if loud else ""

    def _full(self, own: str) -> str:
        used, entries = folder.size(own, ENTRIES)
        full = used > self.disk_mb * MIB or entries > ENTRIES
        return f"left more than {self.disk_mb} MB or {ENTRIES} files" if full else ""

    def _judge(self, process: subprocess.Popen, seen: "_Seen", token: str, seconds: float) -> Ran:
        output = seen.output[: self.output_kb * 1024].decode("utf-8", "replace")
        answer, status = bytes(seen.answer), process.returncode
        if not answer.startswith(b"+"):
            reason = answer[1:].decode("utf-8", "replace") or seen.over or output.strip().rpartition("\n")[2]
            raise SandboxError(f"this machine cannot confine a program ({reason or status}), so no code was run here.")
        if answer == b"+" + token.encode() and status == 0 and not seen.over:
            return Ran(True, output, "", seconds)
        if answer[1:2] == b"-" and not seen.over:
            text = " ".join(answer[2:].decode("utf-8", "replace").split())[:300]
            why = "".join(c if c.isprintable() else "?" for c in text)  # a terminal would obey some
        else:
            why = seen.over or self._explain_status(status)
        return Ran(False, output, why, seconds)

    def _explain_status(self, status: int) -> str:
        if status == -signal.SIGXCPU:
            return f"used more than {self.seconds} s of processor time"
        if status == -signal.SIGKILL:
            return "was killed: its processor time was over, or the machine's memory"
        if status < 0:
            return f"died of {signal.Signals(-status).name}"
        return f"ended with status {status} before its tests were through"


@dataclass
class _Seen:
    """What came out of a program so far, and which bound it broke."""

    output: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)
    over: str = ""


@cache
def packages() -> list[str]:
    """Where what is installed for this interpreter lies: a program may import it."""
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


@cache
def readable() -> list[str]:
    """What a program may read beside its own folder: the interpreter's library and what is installed for it."""
    bases = [os.path.join(base, lib) for base in (sys.base_prefix, sys.base_exec_prefix) for lib in ("lib", "lib64")]
    linked = [place for value in LINKER.values() for place in value.split(":") if place]
    return list(dict.fromkeys([*packages(), *bases, *linked, *LIBRARIES]))


PROBE = """
import os, socket
def refused(act, *arguments):
    try:
        act(*arguments)
    except OSError:
        return
    raise RuntimeError(f"{act.__name__} is not refused")
for act, *more in ((open, "w"), (open, "a"), (open,), (os.truncate, 0), (os.unlink,), (os.chmod, 0), (os.utime,)):
    refused(act, CANARY, *more)
refused(os.rename, CANARY, "mine")
refused(os.rmdir, os.path.dirname(CANARY))
refused(os.mkdir, CANARY + "-2")
refused(socket.socket)
refused(os.fork)
refused(os.kill, os.getppid(), 0)
refused(os.execv, EXECUTABLE, [EXECUTABLE])
with open("own", "w") as file:
    file.write("own")
os.unlink("own")
"""


@cache
def probe() -> None:
    """Tries once what a program must not be able to do. ``SandboxError`` where anything of it succeeds."""
    if sys.platform != "linux":
        raise SandboxError(
            f"code is run on Linux only, where the kernel can confine it, and this is {sys.platform}; "
            "grade the answers on a Linux machine."
        )
    with tempfile.TemporaryDirectory(prefix="fedlora-canary-") as place:
        canary = Path(place) / "canary"
        canary.write_text("alive", encoding="utf-8")
        ran = Sandbox()._run(f"CANARY, EXECUTABLE = {str(canary)!r}, {sys.executable!r}\n{PROBE}", "")
        if not ran.ok or canary.read_text(encoding="utf-8") != "alive":
            raise SandboxError(f"this machine does not confine a program ({ran.why}), so no code is run here.")
