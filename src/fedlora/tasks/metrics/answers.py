"""Graders of generated answers, as in the benchmarks: numbers, options, texts, and SQuAD's exact match and F1."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from fedlora.tasks.metrics.math_answers import MathGrader

Kind = Literal["number", "text", "math"]

# A sign is part of a number only if nothing to subtract from stands before it: 7-3 ends with 3.
NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-−])?[$€£]?(?:(?<=[$€£])[-−])?"  # -3, -$3, $-3
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"  # 1,234.5 or 1234.5 or .5
)
MARK = "####"  # before the answer in GSM8K
ANSWER_IS = re.compile(r"\banswer is:?\s+", re.IGNORECASE)
OPTION = re.compile(r"\(([A-Za-z])\)")
LONE_OPTION = re.compile(r"([A-Za-z])[.):]?(?:\s|$)")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def extract_number(text: str) -> Decimal | None:
    """Return the first number after the last ``####``, or else the last number of the text; None if there is none.

    1,234.5 and $1,234.50 and -3 and 50% are numbers; a full stop after a number is not part of it.
    """
    _, marked, after = text.rpartition(MARK)
    numbers = NUMBER.findall(after) if marked else NUMBER.findall(text)
    if not numbers:
        return extract_number(text.replace(MARK, " ")) if marked else None
    return Decimal(re.sub(r"[^\d.−-]", "", numbers[0 if marked else -1]).replace("−", "-"))


def normalize_text(text: str) -> str:
    """Return the text after "the answer is", or else its first line, in lower case with single spaces, without a full
    stop at the end."""
    answer = ANSWER_IS.split(text)[-1].strip()
    line = answer.splitlines()[0] if answer else ""
    return " ".join(line.casefold().split()).rstrip(".").rstrip()


def extract_option(text: str) -> str | None:
    """Return the letter of the option in a text: (B), or B alone at the beginning; None if there is none."""
    answer = ANSWER_IS.split(text)[-1].strip()
    match = OPTION.search(answer) or LONE_OPTION.match(answer)
    return match[1].upper() if match else None


def grade_answers(texts: Sequence[str], golds: Sequence[str], kind: Kind) -> list[bool]:
    """Return whether each text gives the answer of its gold."""
    if kind == "math":
        with MathGrader() as grader:
            return [grader.is_equal(text, gold) for text, gold in zip(texts, golds)]
    return [is_correct(text, gold, kind) for text, gold in zip(texts, golds)]


def is_correct(text: str, gold: str, kind: Literal["number", "text"]) -> bool:
    """Whether ``text`` gives the answer of ``gold``, which may be an option, as in (B)."""
    if kind == "number":
        number = extract_number(text)
        return number is not None and number == extract_number(gold)
    gold_option = OPTION.fullmatch(gold.strip())
    if gold_option:
        return extract_option(text) == gold_option[1].upper()
    return normalize_text(text) == normalize_text(gold)


def _squad_words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact_match(text: str, golds: Sequence[str]) -> bool:
    """Whether the text has the same words as one of the golds, as SQuAD compares them."""
    return any(_squad_words(text) == _squad_words(gold) for gold in golds)


def answer_f1(text: str, golds: Sequence[str]) -> float:
    """Return SQuAD's F1 over words, 0 to 1, for the best gold; without words, 1 if both have none, else 0."""
    return max(_f1(_squad_words(text), _squad_words(gold)) for gold in golds)


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    return 2 * sum((Counter(words) & Counter(gold)).values()) / (len(words) + len(gold))
