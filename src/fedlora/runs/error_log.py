"""Errors that nobody expected: the traceback goes to a file, and one sentence says where it is."""

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

MOST = 400  # characters of a library's own words that are repeated
DISK_FULL = "the disk is full; what was written before is kept: free some space, or choose another --out."
OWN = __name__.partition(".")[0]
EXPECTED = (ValueError, OSError, FloatingPointError)  # what fedlora raises for a user's mistake


def is_mistake(error: BaseException) -> bool:
    """Whether an error's text is meant for the user: fedlora raised it, or the system did about a file."""
    if type(error).__module__.partition(".")[0] == OWN:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return isinstance(error, EXPECTED) and _origin(error) == OWN


@dataclass(frozen=True)
class Kept:
    """The traceback of an unexpected error on disk."""

    path: str
    origin: str  # the package that raised it


def keep_traceback(error: BaseException, folder: Path | None = None) -> Kept | None:
    """Writes the traceback of an unexpected error to ``error.log`` in ``folder``, once.

    Without a folder, the file is in the current one, or in a temporary one where that cannot be written. None where the
    error is a user's mistake. The answer is kept with the error, which may be on its way to another process.
    """
    if hasattr(error, "fedlora_log"):
        return error.fedlora_log  # type: ignore[no-any-return]
    folders = [folder] if folder else [Path.cwd(), None]
    kept = None if is_mistake(error) else Kept(_write(error, folders), _origin(error))
    with suppress(AttributeError):  # an extension's errors may take no attributes
        error.fedlora_log = kept  # type: ignore[attr-defined]
    return kept


@contextmanager
def tracebacks_in(folder: Path | None, marker: str) -> Iterator[None]:
    """Keeps the traceback of an unexpected error in ``folder``, where that has the file ``marker`` by then."""
    try:
        yield
    except Exception:
        _keep_in(folder, marker, sys.exc_info()[1])
        raise


def _keep_in(folder: Path | None, marker: str, error: BaseException | None) -> None:
    if error is not None and folder is not None and (folder / marker).exists():
        keep_traceback(error, folder)


def sentence(error: BaseException) -> str:
    """What a command says of an error. The traceback of an unexpected one is in a file then."""
    kept, text = keep_traceback(error), " ".join(_words(error).split())
    if kept is None:
        return display_safe(text, len(text))
    name = type(error).__name__
    return (
        f"an unexpected {name} came from {kept.origin}{': ' if text else ''}{display_safe(text, MOST).rstrip('.')}; "
        f"the traceback is in {kept.path!r}: please report it with that file."
    )


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        if error.errno == errno.ENOSPC:
            return DISK_FULL
        if error.filename is not None:
            why = error.strerror[:1].lower() + error.strerror[1:]
            return f"{str(error.filename)!r} cannot be read or written: {why}; name another place."
    return str(error)


def _origin(error: BaseException) -> str:
    """The package whose code raised an error."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "Python" if at is None else str(at.tb_frame.f_globals.get("__name__", "Python")).partition(".")[0]


def _write(error: BaseException, folders: list[Path | None]) -> str:
    """Appends to the file in the first folder that can be written; None stands for a temporary folder."""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n{_versions()}\n"
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


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {sys.version.split()[0]}"]
    for name in ("fedlora", "torch", "transformers", "datasets", "peft"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
