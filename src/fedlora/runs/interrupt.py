"""How a run is stopped: Ctrl-C once, Ctrl-C twice, a full disk, and a second run in the same folder."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fedlora.engines.loop import Event, Watch
from fedlora.schema import ConfigError

WORDS = b"\nfedlora: stopping after this step; Ctrl-C again leaves at once.\n"
STEPS = ("step", "turn")  # a round that is broken off there is dropped whole; later in it, it is nearly finished
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stop:
    """Ctrl-C once lets the current step finish, and raises ``KeyboardInterrupt`` then; twice leaves at once.

    Where ``patient`` is false, as for a run whose steps are in other processes, once raises right away.
    """

    def __init__(self, patient: bool = True):
        self.patient, self.asked = patient, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While Ctrl-C comes here; a program that deals with it in its own way is left to it."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise SystemExit(130)  # every file is written whole or not at all, so there is nothing to finish
        self.asked = True
        if not self.patient:
            raise KeyboardInterrupt
        with suppress(OSError):  # nobody may be reading any more
            os.write(2, WORDS)  # no print: the handler may have broken into one

    def look(self) -> None:
        """``KeyboardInterrupt`` where the run is to stop."""
        if self.asked:
            raise KeyboardInterrupt

    def watched(self, watch: Watch) -> Watch:
        """``watch``, and a look after each step."""

        def told(event: Event) -> None:
            watch(event)
            if event.kind in STEPS:
                self.look()

        return told


@contextmanager
def saying_full(folder: Path | None) -> Iterator[None]:
    """A full disk, a quota or a size limit becomes an ``OSError`` of one sentence."""
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
def alone(folder: Path | None) -> Iterator[None]:
    """While nobody else runs into this folder; the system takes the lock back when a process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        folder = None
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder.") from error
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(place)
        raise ConfigError(f"another run writes into {str(folder)!r}; stop it, or choose another folder.") from error
    try:
        yield
    finally:
        os.close(place)
