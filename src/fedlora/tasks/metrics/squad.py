"""SQuAD's measures of a short answer: exact match and F1 over words, the best over all gold answers."""

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    """Small letters, no punctuation, no articles, single blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(text: str, golds: Sequence[str]) -> bool:
    """Whether the text is one of the golds, both normalised."""
    return any(normalized(text) == normalized(gold) for gold in golds)


def answer_f1(text: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, 0 to 1; where there are none, whether both have none."""
    return max(_f1(normalized(text).split(), normalized(gold).split()) for gold in golds)


def _f1(found: list[str], gold: list[str]) -> float:
    both = sum((Counter(found) & Counter(gold)).values())
    if not found or not gold:
        return float(found == gold)
    return 2 * both / (len(found) + len(gold))
