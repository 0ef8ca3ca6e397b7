"""A sandbox for one Python program: without network, with no files but its own, with every resource bounded.

A machine that cannot confine a program raises ``SandboxError``, and nothing is run.
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
LINKER = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if os.environ.get(key)}  # some interpreters need this
TICK = 0.05  # seconds between checks of the clock and of the folder
ENTRIES = 1000  # files and folders that a program may make
MIB = 2**20


class SandboxError(ValueError):
    """This machine cannot confine a program, and none was run."""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended; ``ok`` if it and all its tests ran to their end."""

    ok: bool
    output: str  # stdout and stderr together
    why: str  # the reason in one line; empty if ok
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """The bounds of a program. The clock is a bound for programs that sleep, so a busy machine fails none."""

    seconds: int = 10  # of processor time
    wall_seconds: float = 60.0
    memory_mb: int = 512  # address space
    disk_mb: int = 16  # the largest file, and all files together
    output_kb: int = 256

    def __post_init__(self):
        for key in ("seconds", "wall_seconds", "memory_mb", "disk_mb", "output_kb"):
            if not getattr(self, key) > 0:
                raise ValueError(f"a sandbox's {key} is {getattr(self, key)}; it must be above 0.")

    def run(self, program: str, tests: str = "", stopped: Callable[[], bool] = lambda: False) -> ProgramResult:
        """Run ``program`` and then ``tests`` in its namespace; ends early once ``stopped`` returns True.

        Raises ``SandboxError`` if this machine cannot confine a program.
        """
        check_confinement()
        return self._run(program, tests, stopped)

    def _run(self, program: str, tests: str, stopped: Callable[[], bool] = lambda: False) -> ProgramResult:
        token, start = secrets.token_hex(16), time.monotonic()
        limits = {"cpu": self.seconds, "memory": self.memory_mb * MIB, "file": self.disk_mb * MIB, "descriptors": 64}
        task = {"readable": find_readable(), "packages": find_packages(), "limits": limits,
                "parent": os.getpid(), "program": program, "tests": tests, "token": token}  # fmt: skip
        own = tempfile.mkdtemp(prefix="fedlora-program-")
        try:
            with tempfile.TemporaryFile() as request:
                request.write(json.dumps(task).encode())
                request.seek(0)
                process, output = self._run_script(own, request, stopped)
        finally:
            folder.remove(own)
        return self._judge(process, output, token, time.monotonic() - start)

    def _run_script(
        self, own: str, request: IO[bytes], stopped: Callable[[], bool]
    ) -> tuple[subprocess.Popen, "_Output"]:
        """Start the script, and watch it until it has ended or was killed."""
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
    ) -> "_Output":
        """Read the output until the program has ended, or breaks a bound that the kernel does not enforce."""
        output, now = _Output(), time.monotonic()
        end, next_check = now + self.wall_seconds, now
        with selectors.DefaultSelector() as selector:
            for descriptor in names:
                selector.register(descriptor, selectors.EVENT_READ)
            while not output.broken and (selector.get_map() or process.poll() is None):
                for key, _ in selector.select(TICK):
                    chunk = os.read(key.fd, 65536)
                    getattr(output, names[key.fd]).extend(chunk)
                    if not chunk:
                        selector.unregister(key.fd)
                now = time.monotonic()
                late = f"ran longer than {self.wall_seconds:g} s" if now > end else "was stopped" if stopped() else ""
                if len(output.output) > self.output_kb * 1024 or len(output.answer) > 4096:
                    late = late or f"wrote more than {self.output_kb} kB of output"
                output.broken = late or (self._check_folder(own) if now > next_check else "")
                next_check = now + TICK if now > next_check else next_check
        return output

    def _check_folder(self, own: str) -> str:
        size, entries = folder.measure(own, ENTRIES)
        is_full = size > self.disk_mb * MIB or entries > ENTRIES
        return f"left more than {self.disk_mb} MB or {ENTRIES} files" if is_full else ""

    def _judge(self, process: subprocess.Popen, read: "_Output", token: str, seconds: float) -> ProgramResult:
        output = read.output[: self.output_kb * 1024].decode("utf-8", "replace")
        answer, status = bytes(read.answer), process.returncode
        if not answer.startswith(b"+"):
            reason = answer[1:].decode("utf-8", "replace") or read.broken or output.strip().rpartition("\n")[2]
            raise SandboxError(f"this machine cannot confine a program ({reason or status}), so no code was run here.")
        if answer == b"+" + token.encode() and status == 0 and not read.broken:
            return ProgramResult(True, output, "", seconds)
        if answer[1:2] == b"-" and not read.broken:
            text = " ".join(answer[2:].decode("utf-8", "replace").split())[:300]
            why = "".join(c if c.isprintable() else "?" for c in text)  # a terminal acts on some characters
        else:
            why = read.broken or self._explain_status(status)
        return ProgramResult(False, output, why, seconds)

    def _explain_status(self, status: int) -> str:
        if status == -signal.SIGXCPU:
            return f"used more than {self.seconds} s of processor time"
        if status == -signal.SIGKILL:
            return "was killed: its processor time was over, or the machine's memory"
        if status < 0:
            return f"died of {signal.Signals(-status).name}"
        return f"ended with status {status} before its tests were through"


@dataclass
class _Output:
    """The output of a program so far, and the bound that it broke."""

    output: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)
    broken: str = ""


def find_packages() -> list[str]:
    """Return the folders of the installed packages, which a program may import."""
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def find_readable() -> list[str]:
    """Return the folders that a program may read beside its own: the interpreter's library and the packages."""
    bases = [os.path.join(base, lib) for base in (sys.base_prefix, sys.base_exec_prefix) for lib in ("lib", "lib64")]
    linked = [path for value in LINKER.values() for path in value.split(":") if path]
    return list(dict.fromkeys([*find_packages(), *bases, *linked, *LIBRARIES]))


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
def check_confinement() -> None:
    """Try once the acts that a program must not be able to do; ``SandboxError`` if one succeeds."""
    if sys.platform != "linux":
        raise SandboxError(
            f"code is run on Linux only, where the kernel can confine it, and this is {sys.platform}; "
            "grade the answers on a Linux machine."
        )
    with tempfile.TemporaryDirectory(prefix="fedlora-canary-") as parent:
        canary = Path(parent) / "canary"
        canary.write_text("alive", encoding="utf-8")
        result = Sandbox()._run(f"CANARY, EXECUTABLE = {str(canary)!r}, {sys.executable!r}\n{PROBE}", "")
        if not result.ok or canary.read_text(encoding="utf-8") != "alive":
            raise SandboxError(f"this machine does not confine a program ({result.why}), so no code is run here.")
