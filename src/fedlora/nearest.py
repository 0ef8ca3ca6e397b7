"""What somebody who misspelt a name most likely meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` begins, or else the most alike; None where none is near."""
    options = list(known)
    begun = [option for option in options if len(name) > 2 and option.startswith(name.lower())]
    alike = difflib.get_close_matches(name.lower().replace("_", "-"), options, n=1, cutoff=0.5)
    alike = alike or difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return (begun or alike or [None])[0]


def name_or_nearest(what: str, name: str, known: Iterable[str]) -> tuple[str | None, str]:
    """The known name, or else the nearest (None where none is near), and the subject of a sentence about it."""
    options = list(known)
    if name in options:
        return name, f"the {what} {name!r}"
    near = nearest(name, options)
    return near, f"there is no {what} {name!r}, and the nearest, {near!r},"


def unknown(what: str, name: str, known: Iterable[str], plural: str) -> str:
    """One sentence: that there is no such thing, which was meant, and what there is."""
    options = list(known)
    near = nearest(name.rpartition(".")[2], options)
    hint = f"; did you mean {near!r}?" if near else "."
    return f"there is no {what} {name!r}{hint} The {plural} are {', '.join(options)}."
