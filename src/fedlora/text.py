"""Texts of other parties, made fit for a terminal, a log or a file's name."""

import re

SAID = 400  # characters of what another party says that are shown
NO_FILE = re.compile(r"[/\\]|\.\.|^[.~]|^$|^.{129}")  # what a name may not have, if it becomes a file's


def display_safe(text: object, most: int = SAID) -> str:
    """What another party said, fit for a log or a terminal: no control characters, no escapes, and not endless."""
    found = str(text)
    cut = found[:most] + ("..." if len(found) > most else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def safe_filename(name: str, what: str) -> str:
    """A name that may become a file's or a folder's. ``ValueError`` where it could lead elsewhere."""
    if NO_FILE.search(name) or not name.isprintable():
        raise ValueError(
            f"{what} is named {display_safe(name, 60)!r}, and the name becomes a folder's; write it without slashes, "
            "without '..' and without control characters."
        )
    return name
