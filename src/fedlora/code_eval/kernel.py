"""The confinement of a process by Linux: limits, no capabilities, Landlock for files, a filter of system calls.

Every step applies to the calling process alone, needs no privilege and is permanent. A step that fails raises
``UnconfinedError``, and nothing may run then. This file imports the standard library only.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable

from syscalls import read_syscalls

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
ENOSYS, EPERM = 38, 1

# Landlock's rights over files, and the ABI that added each later one.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
LATER = {2: REFER, 3: TRUNCATE, 5: IOCTL_DEV}
FIRST = (1 << 13) - 1  # all rights of the first ABI
OWN = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
TCP, SCOPES = 0b11, 0b11  # bind and connect (ABI 4); abstract sockets and signals (ABI 6)

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in the data of a filter
TERMINAL_AND_DESCRIPTORS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # of ioctl: used by open() and isatty()
DESCRIPTORS_AND_LOCKS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # of fcntl: no owners, leases or seals
O_ACCMODE, O_TRUNC = os.O_ACCMODE, os.O_TRUNC
OPENINGS = (0, 1, 2, 1 | O_TRUNC, 2 | O_TRUNC)  # the first ABI does not see O_TRUNC of a read-only opening


class UnconfinedError(OSError):
    """A step of the confinement failed; the text names the step and the reason."""


_libc = ctypes.CDLL(None, use_errno=True)


def _call(step: str, number: int, *arguments) -> int:
    """Make a raw system call; ``UnconfinedError`` if the kernel refuses."""
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *plain)
    if result < 0:
        raise UnconfinedError(f"{step}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(step: str, option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise UnconfinedError(f"{step}: {os.strerror(ctypes.get_errno())}")


def confine(own: str, readable: Iterable[str], limits: dict[str, int], parent: int) -> None:
    """Confine the calling process for good: it may write beneath ``own`` and read beneath ``readable``.

    ``limits`` are ``cpu`` (seconds), ``memory`` and ``file`` (bytes) and ``descriptors``. The process dies with
    ``parent``.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise UnconfinedError(f"system calls of the processor {machine!r} are not known here")
    _, others = read_syscalls(machine)
    _prctl("die with the parent", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise UnconfinedError("the parent is gone")
    _set_limits(limits)
    _prctl("no new privileges", PR_SET_NO_NEW_PRIVS, 1)
    _prctl("not dumpable", PR_SET_DUMPABLE, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))  # with rights, root could overrule modes
    _call("drop capabilities", others["capset"], header, ctypes.create_string_buffer(24))
    restrict_files(others, own, readable)
    install_filter(others["seccomp"], build_filter(machine, os.getpid()))


def _set_limits(limits: dict[str, int]) -> None:
    for kind, low, high in (
        (resource.RLIMIT_CPU, limits["cpu"], limits["cpu"] + 1),  # a signal first, which tells the cause
        (resource.RLIMIT_AS, limits["memory"], limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file"], limits["file"]),
        (resource.RLIMIT_NOFILE, limits["descriptors"], limits["descriptors"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            low, high = min(low, most), min(high, most)
        resource.setrlimit(kind, (low, high))


def restrict_files(others: dict[str, int], own: str, readable: Iterable[str]) -> None:
    """Allow writing, making and removing files beneath ``own`` only, and reading beneath ``readable`` as well."""
    abi = _call("Landlock", others["landlock_create_ruleset"], 0, 0, 1)  # the kernel's version of Landlock
    handled = FIRST | sum(right for since, right in LATER.items() if since <= abi)
    words = [handled] + [TCP] * (abi >= 4) + [SCOPES] * (abi >= 6)
    ruleset = ctypes.create_string_buffer(struct.pack(f"{len(words)}Q", *words))
    rules = _call("Landlock", others["landlock_create_ruleset"], ruleset, 8 * len(words), 0)
    wanted = [(own, OWN), ("/dev/null", READ_FILE | WRITE_FILE)]
    for path, rights in [*wanted, *((path, READ_FILE | READ_DIR) for path in readable if os.path.exists(path))]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE
        beneath = ctypes.create_string_buffer(struct.pack("=Qi", rights & handled, descriptor))
        _call(f"Landlock on {path!r}", others["landlock_add_rule"], rules, 1, beneath, 0)
        os.close(descriptor)
    _call("Landlock", others["landlock_restrict_self"], rules, 0)
    os.close(rules)


def build_filter(machine: str, own: int) -> bytes:
    """Build the filter of system calls; signals may go to the process ``own`` only, which is the caller."""
    free, others = read_syscalls(machine)
    everything = 0xFFFFFFFF
    code = [_encode(LOAD, ARCHITECTURE), _encode(EQUAL, ARCHITECTURES[machine], 1, 0), _encode(RETURN, KILL)]
    code.append(_encode(LOAD, NUMBER))
    for number in free.values():
        code += [_encode(EQUAL, number, 0, 1), _encode(RETURN, ALLOW)]
    for name, argument, mask, values in (
        ("open", 1, O_ACCMODE | O_TRUNC, OPENINGS),
        ("openat", 2, O_ACCMODE | O_TRUNC, OPENINGS),
        ("ioctl", 1, everything, TERMINAL_AND_DESCRIPTORS),
        ("fcntl", 1, everything, DESCRIPTORS_AND_LOCKS),
        ("prlimit64", 0, everything, (0, own)),
        *((name, 0, everything, (own,)) for name in ("kill", "tkill", "tgkill")),
    ):
        if name in others:  # allowed if the low half of the argument, masked, is one of the values
            inner = [_encode(LOAD, ARGUMENTS + 8 * argument), _encode(AND, mask)]
            for value in values:
                inner += [_encode(EQUAL, value, 0, 1), _encode(RETURN, ALLOW)]
            inner.append(_encode(RETURN, REFUSE | EPERM))
            code += [_encode(EQUAL, others[name], 0, len(inner)), *inner]
    for name in ("clone3", "openat2"):  # the C library then tries the older call, whose arguments a filter can read
        code += [_encode(EQUAL, others[name], 0, 1), _encode(RETURN, REFUSE | ENOSYS)]
    return b"".join([*code, _encode(RETURN, REFUSE | EPERM)])


def _encode(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """Encode one instruction; ``yes`` and ``no`` are the instructions to skip after a comparison."""
    return struct.pack("HBBI", code, yes, no, value)


def install_filter(number: int, code: bytes) -> None:
    """Install a filter in the calling process, which needs no privilege after ``PR_SET_NO_NEW_PRIVS``."""
    instructions = ctypes.create_string_buffer(code)
    header = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(instructions)))
    _call("seccomp", number, 1, 0, header)
