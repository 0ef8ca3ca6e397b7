"""The problems of HumanEval and MBPP, the program in a model's answer, and pass@k.

A program runs in ``Sandbox`` with its problem's tests behind it, and passes if the last test has run to its end.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Event
from typing import Any

from fedlora.code_eval.sandbox import Sandbox, check_confinement

# Strings that end a generated continuation: HumanEval's (Chen et al. 2021), and MBPP's with few shots.
STOPS = {"humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"), "mbpp": ("[DONE]", "\nassert", "\n```")}
FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError)  # raised by text that is no Python
LONGEST = 5000  # lines of an answer that are read
FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """A prompt, and the tests that the model's program must pass."""

    task_id: str
    prompt: str
    tests: str  # run behind the program, in its namespace
    context: str = ""  # code that an answer may continue: HumanEval's prompt
    entry_point: str | None = None  # the name of the wanted function, if the problem has one

    def program(self, answer: str) -> str:
        """Extract the program from an answer: a fenced block, a whole function, or a continuation of ``context``.

        Text around the code is removed, and so are its top-level assertions and calls of ``print``.
        """
        text = "\n".join(_find_code(answer, self.entry_point).split("\n")[:LONGEST])
        entry = rf"^(async )?def {re.escape(self.entry_point or '')}\b"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the answer's strings
            if not self.context or re.search(entry, text, re.MULTILINE):
                whole = f"{self.context}\n{text}" if self.context else _strip_preamble(text)
                return _remove_checks(_find_longest(whole))
            # Tokenizers and chat models may drop the indentation of the first line, or of every line.
            tries = [f"{self.context}{body}" for body in (text, f"    {text}", textwrap.indent(text, "    "))]
            best = next((t for t in tries if _find_error(t) is None), tries[0])
            return _remove_checks(_find_longest(best, len(self.context)))


def parse_humaneval(row: Mapping[str, Any]) -> Problem:
    """Convert a row of HumanEval, whose tests pass the function to ``check``."""
    tests = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    return Problem(str(row["task_id"]), row["prompt"], tests, row["prompt"], row["entry_point"])


def parse_mbpp(row: Mapping[str, Any]) -> Problem:
    """Convert a row of MBPP, or of its sanitised version; the prompt shows the tests (Austin et al. 2021)."""
    text = row["text"] if "text" in row else row["prompt"]
    tests = "\n".join(row["test_list"])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    prompt = (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
    return Problem(str(row["task_id"]), prompt, f"{setup}\n{tests}\n")


BENCHMARKS: Mapping[str, tuple[Callable[[Mapping[str, Any]], Problem], tuple[str, ...]]] = {
    "humaneval": (parse_humaneval, ("task_id", "prompt", "entry_point", "test")),
    "mbpp": (parse_mbpp, ("task_id", "test_list")),
}


def parse_problems(rows: Sequence[Mapping[str, Any]], benchmark: str | None = None) -> list[Problem]:
    """Convert rows to problems. Without a name, the benchmark is recognised by the rows' columns."""
    columns = set(rows[0]) if rows else set()
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise ValueError(f"the benchmark is {benchmark!r}; it is {' or '.join(map(repr, BENCHMARKS))}.")
    fits = [name for name, (_, needed) in BENCHMARKS.items() if columns >= set(needed) and benchmark in (None, name)]
    if not fits:
        names = [benchmark] if benchmark else BENCHMARKS
        wanted = " or ".join(", ".join(BENCHMARKS[name][1]) for name in names)
        raise ValueError(f"the data has the columns {', '.join(sorted(columns)) or 'of no row'}; it needs {wanted}.")
    return [BENCHMARKS[fits[0]][0](row) for row in rows]


@dataclass(frozen=True)
class Graded:
    """The outcome of one answer to one problem, with the keys of a line of verdicts."""

    task_id: str
    sample: int  # the answer's number among the task's, from 0
    passed: bool
    why: str
    seconds: float


def run_answers(
    problems: Iterable[Problem],
    answers: Mapping[str, Sequence[str]],
    sandbox: Sandbox | None = None,
    workers: int = 1,
    done: Callable[[Graded], None] = lambda graded: None,
) -> list[Graded]:
    """Run every answer, ``workers`` at a time; the outcomes are in the order of the problems.

    Raises ``SandboxError`` before anything is run if this machine cannot confine a program.
    """
    box = sandbox or Sandbox()
    check_confinement()
    jobs = [
        (problem, number, problem.program(answer))
        for problem in problems
        for number, answer in enumerate(answers.get(problem.task_id, ()))
    ]

    def run_job(job: tuple[Problem, int, str]) -> Graded:
        problem, number, program = job
        result = box.run(program, problem.tests, stopped.is_set)
        graded = Graded(problem.task_id, number, result.ok, result.why, round(result.seconds, 3))
        done(graded)
        return graded

    pool, stopped = ThreadPoolExecutor(max(1, workers)), Event()
    try:
        return list(pool.map(run_job, jobs))
    finally:
        stopped.set()  # so that Ctrl-C does not wait for programs that sleep
        pool.shutdown(cancel_futures=True)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of ``k`` of ``n`` samples is among the ``c`` right ones: 1 − C(n−c, k) / C(n, k).

    The estimate is unbiased (Chen et al. 2021). A product of ratios avoids large binomials.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of a task; there are {n}, {c} of them right.")
    return 1.0 if n - c < k else 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def compute_pass_rates(problems: Sequence[Problem], answers: Iterable[Graded], ks: Sequence[int]) -> dict[str, float]:
    """Compute ``pass@k`` as means over all problems; a problem without any answer counts as wrong."""
    counts = {problem.task_id: [0, 0] for problem in problems}
    for answer in answers:
        counts[answer.task_id][0] += 1
        counts[answer.task_id][1] += answer.passed
    short = [(task, n) for task, (n, _) in counts.items() if 0 < n < max(ks)]
    if short:
        raise ValueError(
            f"pass@{max(ks)} needs {max(ks)} answers of a task, but {short[0][0]!r} has {short[0][1]}; lower k."
        )
    return {f"pass@{k}": sum(pass_at_k(n, c, k) if n else 0.0 for n, c in counts.values()) / len(counts) for k in ks}


def _find_code(answer: str, entry: str | None) -> str:
    """Return the fenced block that defines the entry point, else the longest block, else the whole answer."""
    text = answer.replace("\r\n", "\n").partition("[DONE]")[0].rpartition("[BEGIN]\n")[2]
    blocks = FENCED.findall(text)
    wanted = [block for block in blocks if entry and f"def {entry}" in block]
    return (wanted or sorted(blocks, key=len, reverse=True) or [text])[0]


def _strip_preamble(text: str) -> str:
    """Remove a chat model's words before its code."""
    begin = re.search(r"^(?:(?:async def|def|class|import) \w|from [\w.]+ import |@\w)", text, re.MULTILINE)
    return text[begin.start() :] if _find_error(text) and begin else text


def _find_error(text: str) -> Exception | None:
    """Return the error of a text that is no Python, else None; runs nothing."""
    try:
        compile(text, "<answer>", "exec")  # finds more errors than parsing, such as a return outside a function
    except FAULTS as error:
        return error
    return None


def _find_longest(text: str, least: int = 0) -> str:
    """Return the longest run of first lines that is Python, since answers are often cut; ``text`` if there is none."""
    lines = text.split("\n")
    while lines and len(cut := "\n".join(lines)) >= least:
        error = _find_error(cut)
        if error is None:
            return cut
        number = getattr(error, "lineno", None) or len(lines)
        del lines[max(0, min(number, len(lines)) - 1) :]
    return text


def _remove_checks(text: str) -> str:
    """Remove top-level assertions and calls of ``print``, with which an answer checks itself."""
    lines = text.split("\n")
    for node in [] if _find_error(text) else ast.parse(text).body:
        call = getattr(getattr(node, "value", None), "func", None) if isinstance(node, ast.Expr) else None
        if isinstance(node, ast.Assert) or getattr(call, "id", None) == "print":
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)
