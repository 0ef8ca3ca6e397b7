"""Interruptions of a run: Ctrl-C, a full disk, and a second run in the same folder."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fedlora.engines.loop import Event, Watch
from fedlora.schema import ConfigError

MESSAGE = b"\nfedlora: stopping after this step; Ctrl-C again leaves at once.\n"
STEPS = ("step", "turn")  # events after which a run stops; its round is dropped. Later, a round is nearly finished
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stop:
    """Handles Ctrl-C: the first lets the current step finish and then raises ``KeyboardInterrupt``, the second exits.

    If ``is_patient`` is false, as for a run whose steps are in other processes, the first raises at once.
    """

    def __init__(self, is_patient: bool = True):
        self.is_patient, self.is_requested = is_patient, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C within the block, unless the program has its own handler."""
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with handle_signals(self._handle, *([signal.SIGINT] if is_default else [])):
            yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise SystemExit(130)  # files are written as a whole, so nothing needs to be finished
        self.is_requested = True
        if not self.is_patient:
            raise KeyboardInterrupt
        with suppress(OSError):  # stderr may be closed
            os.write(2, MESSAGE)  # not print: the handler may have interrupted one

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if the run should stop."""
        if self.is_requested:
            raise KeyboardInterrupt

    def wrap(self, watch: Watch) -> Watch:
        """Return a function that calls ``watch``, and ``check`` after each step."""

        def notify(event: Event) -> None:
            watch(event)
            if event.kind in STEPS:
                self.check()

        return notify


@contextmanager
def handle_signals(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Use this handler for the signals meanwhile. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


@contextmanager
def explain_full_disk(folder: Path | None) -> Iterator[None]:
    """Explain the error of a full disk, a quota or a size limit in one sentence."""
    try:
        yield
    except OSError as error:
        if folder is None or error.errno not in FULL:
            raise
        raise OSError(
            f"the disk is full: {str(folder)!r} keeps every round that was finished; free some space, and "
            f"`fedlora resume {folder}` goes on."
        ) from error


@contextmanager
def lock_folder(folder: Path | None) -> Iterator[None]:
    """Make a folder and lock it against other runs; the system releases the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        folder = None
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"another run writes into {str(folder)!r}; stop it, or choose another folder.") from error
    try:
        yield
    finally:
        os.close(descriptor)
