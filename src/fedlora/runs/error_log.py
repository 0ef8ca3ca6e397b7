"""Unexpected errors: the traceback is written to a file, and one sentence names the file."""

import errno
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora.runs.file_names import ERROR_LOG
from fedlora.text import display_safe

MOST = 400  # characters of a library's message
DISK_FULL = "the disk is full; what was written before is kept: free some space, or choose another --out."
OWN = __name__.partition(".")[0]
EXPECTED = (ValueError, OSError, FloatingPointError)  # raised for a user's mistake


def is_mistake(error: BaseException) -> bool:
    """Whether an error is for the user: fedlora raised it, or the system did for a file."""
    if type(error).__module__.partition(".")[0] == OWN or (isinstance(error, OSError) and error.errno is not None):
        return True
    return isinstance(error, EXPECTED) and _origin(error) == OWN


@dataclass(frozen=True)
class TracebackFile:
    """The file with the traceback of an unexpected error."""

    path: str
    origin: str  # the package that raised it


def write_traceback(error: BaseException, folder: Path | None = None) -> TracebackFile | None:
    """Write the traceback of an unexpected error to ``error.log`` in ``folder``, once; None for a user's mistake.

    Without a folder, the file is in the current folder, or else in a temporary one. The result is stored in the error,
    which may be sent to another process.
    """
    if hasattr(error, "fedlora_log"):
        return error.fedlora_log  # type: ignore[no-any-return]
    folders = [folder] if folder else [Path.cwd(), None]
    file = None if is_mistake(error) else TracebackFile(_write(error, folders), _origin(error))
    with suppress(AttributeError):  # errors of extensions may have no attributes
        error.fedlora_log = file  # type: ignore[attr-defined]
    return file


@contextmanager
def tracebacks_in(folder: Path | None, marker: str) -> Iterator[None]:
    """Write the traceback of an unexpected error into ``folder``, if that has the file ``marker`` by then."""
    try:
        yield
    except Exception:
        _write_if(folder, marker, sys.exc_info()[1])
        raise


def _write_if(folder: Path | None, marker: str, error: BaseException | None) -> None:
    if error is not None and folder is not None and (folder / marker).exists():
        write_traceback(error, folder)


def explain_error(error: BaseException) -> str:
    """Return an error as one sentence. The traceback of an unexpected error is written to a file."""
    file, text = write_traceback(error), " ".join(_message(error).split())
    if file is None:
        return display_safe(text, len(text))
    name = type(error).__name__
    return (
        f"an unexpected {name} came from {file.origin}{': ' if text else ''}{display_safe(text, MOST).rstrip('.')}; "
        f"the traceback is in {file.path!r}: please report it with that file."
    )


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        if error.errno == errno.ENOSPC:
            return DISK_FULL
        if error.filename is not None:
            why = error.strerror[:1].lower() + error.strerror[1:]
            return f"{str(error.filename)!r} cannot be read or written: {why}; name another place."
    return str(error)


def _origin(error: BaseException) -> str:
    """Return the package that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "Python")).partition(".")[0] if frames else "Python"


def _write(error: BaseException, folders: list[Path | None]) -> str:
    """Append the traceback to the file in the first folder that can be written; None stands for a temporary one."""
    names = ("fedlora", "torch", "transformers", "datasets", "peft")
    versions = [f"{name} {version}" for name in names if (version := find_version(name)) is not None]
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n"
    text += f"{', '.join([f'Python {sys.version.split()[0]}', *versions])}\n"
    text += "".join(traceback.format_exception(error)) + "\n"
    for folder in folders:
        try:
            path = (folder or Path(tempfile.mkdtemp(prefix="fedlora-"))) / ERROR_LOG
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return str(path)
    return "(nowhere: no folder could be written; set FEDLORA_TRACEBACK=1)"


def find_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
