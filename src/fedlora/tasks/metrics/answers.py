"""Answers graded as the benchmarks do: the number that a text comes to, or the answer's own words."""

import re
from decimal import Decimal
from typing import Literal

Kind = Literal["number", "text"]

# A sign belongs to a number only where nothing stands before it that it could be subtracted from: 7-3 ends with 3.
NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-−])?[$€£]?(?:(?<=[$€£])[-−])?"  # -3, -$3, $-3
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"  # 1,234.5 or 1234.5 or .5
)
MARK = "####"  # before the answer in GSM8K
SAID = re.compile(r"\banswer is:?\s+", re.IGNORECASE)
OPTION = re.compile(r"\(([A-Za-z])\)")
LONE_OPTION = re.compile(r"([A-Za-z])[.):]?(?:\s|$)")


def number(text: str) -> Decimal | None:
    """The first number after the last ``####``, or else the last number of the text; None where there is none.

    1,234.5 and $1,234.50 and -3 and 50% are numbers; a full stop after one is none of it.
    """
    _, marked, after = text.rpartition(MARK)
    found = NUMBER.findall(after) if marked else NUMBER.findall(text)
    if not found:
        return number(text.replace(MARK, " ")) if marked else None
    digits = found[0] if marked else found[-1]
    return Decimal(re.sub(r"[^\d.−-]", "", digits).replace("−", "-"))


def words(text: str) -> str:
    """A text's answer in a form to compare: what follows "the answer is", else the first line; small letters, single
    spaces, no full stop at its end."""
    said = SAID.split(text)[-1].strip()
    line = said.splitlines()[0] if said else ""
    return " ".join(line.casefold().split()).rstrip(".").rstrip()


def option(text: str) -> str | None:
    """The letter of an option that a text takes: (B), or B by itself at the beginning; None where there is none."""
    said = SAID.split(text)[-1].strip()
    found = OPTION.search(said) or LONE_OPTION.match(said)
    return found[1].upper() if found else None


def right(text: str, gold: str, kind: Kind) -> bool:
    """Whether ``text`` gives the answer that ``gold`` gives. ``gold`` may be an option, as in (B)."""
    if kind == "number":
        found, wanted = number(text), number(gold)
        return found is not None and found == wanted
    chosen = OPTION.fullmatch(gold.strip())
    if chosen:
        return option(text) == chosen[1].upper()
    return words(text) == words(gold)
