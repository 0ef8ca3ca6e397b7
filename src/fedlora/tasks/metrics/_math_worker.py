"""A program that grades mathematical answers: a line of JSON for each on stdin, and one for its grade on stdout.

It runs alone, without fedlora, in a process that may be killed: SymPy can take hours or all memory for a short text.
math-verify's own timeouts are signals, which only work in a main thread. Only ``MathGrader`` starts it.
"""

import contextlib
import json
import logging
import sys
from typing import Any

MEMORY = 4 << 30  # bytes of address space
DELIMITERS = ("\\boxed", "\\fbox", "$", "\\(", "\\[")


def limit_memory() -> None:
    """Limit this process' memory, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def parse_gold(text: str) -> list[Any]:
    """Return the expressions of a right answer: a solution that marks its answer, or the LaTeX of the answer alone."""
    from math_verify import parse

    is_alone = not any(mark in text for mark in DELIMITERS) and "answer" not in text.lower()
    return parse(f"${text.strip()}$" if is_alone else text, parsing_timeout=None)


def answer(text: str | None, gold: str) -> bool:
    """Whether ``text`` equals ``gold``; without a text, whether ``gold`` is an answer."""
    from math_verify import parse, verify

    right = parse_gold(gold)
    if text is None or not right:
        return bool(right)
    return bool(verify(right, parse(text, parsing_timeout=None), timeout_seconds=None))


def _serve() -> None:
    limit_memory()
    logging.disable()
    answer("1", "1")  # imports, before the time of the first question begins
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            reply = answer(*json.loads(line))
        except (Exception, MemoryError, RecursionError):  # a text that the parser fails on equals nothing
            reply = False
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
