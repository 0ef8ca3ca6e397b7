"""The folder of one program: measured, and removed whatever the program left in it."""

import os
from itertools import count


def measure(folder: str, most: int) -> tuple[int, int]:
    """Return the bytes on disk and the entries beneath ``folder``, without following links.

    Counting ends after ``most`` entries.
    """
    size, entries, pending = 0, 0, [folder]
    while pending and entries <= most:
        try:
            with os.scandir(pending.pop()) as listing:
                for entry in listing:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:  # moved or removed meanwhile, or the path is too long
            entries += 1
    return size, entries


def remove(folder: str) -> None:
    """Remove a folder of any depth; no process may write to it any more.

    Subfolders are moved to the top and emptied there, so no path gets too long.
    """
    fresh = (os.path.join(folder, f".{number}") for number in count())
    pending = [folder]
    while pending:
        current = pending.pop()
        os.chmod(current, 0o700)  # the program may have taken the owner's rights away
        with os.scandir(current) as listing:
            entries = list(listing)
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)  # moving a folder changes its "..", so it must be writable
            path = entry.path
            if current != folder:
                path = next(p for p in fresh if not os.path.lexists(p))
                os.rename(entry.path, path)
            pending.append(path)
        if current != folder:
            os.rmdir(current)
    os.rmdir(folder)
