"""A fresh folder for one program: how much lies in it, and its removal whatever a program has left there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


@contextmanager
def fresh() -> Iterator[str]:
    """An empty folder that is gone afterwards."""
    path = tempfile.mkdtemp(prefix="fedlora-program-")
    try:
        yield path
    finally:
        remove(path)


def size(folder: str, most: int) -> tuple[int, int]:
    """Bytes on disk and entries beneath ``folder``; counting ends at ``most`` entries. Links are not followed."""
    found, entries, open_ = 0, 0, [folder]
    while open_ and entries <= most:
        try:
            with os.scandir(open_.pop()) as listing:
                for entry in listing:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        open_.append(entry.path)
                    found += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:  # moved or removed meanwhile, or too deep a path: it is counted the next time, or not at all
            entries += 1
    return found, entries


def remove(folder: str) -> None:
    """Removes a folder however deep it is: folders move up and are emptied there, so no path grows long.

    Nobody may write there any more.
    """
    fresh = (os.path.join(folder, f".{number}") for number in count())
    pending = [folder]
    while pending:
        here = pending.pop()
        os.chmod(here, 0o700)  # a folder can be made without rights for its owner
        with os.scandir(here) as listing:
            entries = list(listing)
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)  # to be moved, a folder must be writable: its ".." changes
            place = entry.path
            if here != folder:
                place = next(p for p in fresh if not os.path.lexists(p))
                os.rename(entry.path, place)
            pending.append(place)
        if here != folder:
            os.rmdir(here)
    os.rmdir(folder)
