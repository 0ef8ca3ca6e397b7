"""Texts from other machines, made safe for a terminal, a log or a file's name."""

import re

LONGEST = 400  # characters
NO_FILE = re.compile(r"[/\\]|\.\.|^[.~]|^$|^.{129}")  # not allowed in the name of a file


def display_safe(text: object, most: int = LONGEST) -> str:
    """Return a text of another machine without control characters, and with at most ``most`` characters."""
    full = str(text)
    cut = full[:most] + ("..." if len(full) > most else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def safe_filename(name: str, what: str) -> str:
    """Return the name. Raises ``ValueError`` if it cannot safely be the name of a file or a folder."""
    if NO_FILE.search(name) or not name.isprintable():
        raise ValueError(
            f"{what} is named {display_safe(name, 60)!r}, and the name becomes a folder's; write it without slashes, "
            "without '..' and without control characters."
        )
    return name
