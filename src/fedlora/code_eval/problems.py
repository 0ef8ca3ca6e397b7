"""Model-written programs, graded by their tests: HumanEval's and MBPP's problems, and pass@k.

A program is taken out of a model's answer, run in ``Sandbox`` with its problem's tests behind it, and right only where
the last test has run through.
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

from fedlora.code_eval.sandbox import Ran, Sandbox

# Where a continuation of HumanEval's prompts ends when it is generated (Chen et al. 2021), and MBPP's of few shots.
STOPS = {"humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"), "mbpp": ("[DONE]", "\nassert", "\n```")}
FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError)  # of text that is no Python
LONGEST = 5000  # lines of an answer that are looked at
FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """What a model is asked, and the tests that its program must pass."""

    task_id: str
    prompt: str
    tests: str  # run behind the program, in its namespace
    context: str = ""  # code that an answer may continue: HumanEval's prompt
    entry_point: str | None = None  # the function that is asked for, where the problem names it

    def program(self, answer: str) -> str:
        """The program in an answer: a fenced block, a whole function, or a continuation of ``context``.

        Words before and behind the code go, and so do its own calls of ``print`` and its own assertions.
        """
        text = "\n".join(_code(answer, self.entry_point).split("\n")[:LONGEST])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the answer's own escapes
            if not self.context or self._complete(text):
                return _quiet(_longest(f"{self.context}\n{text}" if self.context else _strip_preamble(text)))
            # Tokenizers and chat models drop the first line's indentation, or every line's.
            tries = [f"{self.context}{body}" for body in (text, f"    {text}", textwrap.indent(text, "    "))]
            return _quiet(_longest(next((t for t in tries if _tree(t) is not None), tries[0]), len(self.context)))

    def _complete(self, text: str) -> bool:
        return re.search(rf"^(async )?def {re.escape(self.entry_point or '')}\b", text, re.MULTILINE) is not None


def humaneval(row: Mapping[str, Any]) -> Problem:
    """A row of HumanEval: the completed function is handed to ``check``."""
    tests = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    return Problem(str(row["task_id"]), row["prompt"], tests, row["prompt"], row["entry_point"])


def mbpp(row: Mapping[str, Any]) -> Problem:
    """A row of MBPP, or of its sanitised version: the task in words, with its tests shown (Austin et al. 2021)."""
    text = row["text"] if "text" in row else row["prompt"]
    tests = "\n".join(row["test_list"])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    prompt = (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
    return Problem(str(row["task_id"]), prompt, f"{setup}\n{tests}\n")


BENCHMARKS: Mapping[str, tuple[Callable[[Mapping[str, Any]], Problem], tuple[str, ...]]] = {
    "humaneval": (humaneval, ("task_id", "prompt", "entry_point", "test")),
    "mbpp": (mbpp, ("task_id", "test_list")),
}


def problems(rows: Sequence[Mapping[str, Any]], benchmark: str | None = None) -> list[Problem]:
    """The rows as problems; the benchmark is known by its columns where it is not named. ``ValueError`` if by none."""
    columns = set(rows[0]) if rows else set()
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise ValueError(f"the benchmark is {benchmark!r}; it is {' or '.join(map(repr, BENCHMARKS))}.")
    fits = [name for name, (_, needed) in BENCHMARKS.items() if columns >= set(needed) and benchmark in (None, name)]
    if not fits:
        wanted = BENCHMARKS[benchmark][1] if benchmark else " or ".join(", ".join(n) for _, n in BENCHMARKS.values())
        wanted = wanted if isinstance(wanted, str) else ", ".join(wanted)
        raise ValueError(f"the data has the columns {', '.join(sorted(columns)) or 'of no row'}; it needs {wanted}.")
    return [BENCHMARKS[fits[0]][0](row) for row in rows]


@dataclass(frozen=True)
class Verdict:
    """One answer to one problem, run."""

    task_id: str
    sample: int  # which of the task's answers, from 0
    passed: bool
    why: str
    seconds: float


def run_answers(
    found: Iterable[Problem],
    answers: Mapping[str, Sequence[str]],
    sandbox: Sandbox | None = None,
    workers: int = 1,
    done: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Runs every answer, ``workers`` at a time, in the order of the problems. A problem without answers has none.

    ``SandboxError`` before anything is run, where this machine cannot confine a program.
    """
    box = sandbox or Sandbox()
    box.ready()
    jobs = [
        (problem, number, problem.program(answer))
        for problem in found
        for number, answer in enumerate(answers.get(problem.task_id, ()))
    ]

    def one(job: tuple[Problem, int, str]) -> Verdict:
        problem, number, program = job
        ran: Ran = box.run(program, problem.tests, stopped.is_set)
        verdict = Verdict(problem.task_id, number, ran.ok, ran.why, round(ran.seconds, 3))
        done(verdict)
        return verdict

    pool, stopped = ThreadPoolExecutor(max(1, workers)), Event()
    try:
        return list(pool.map(one, jobs))
    finally:
        stopped.set()  # Ctrl-C waits for no program that sleeps
        pool.shutdown(cancel_futures=True)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of ``k`` of ``n`` samples is among the ``c`` right ones: 1 − C(n−c, k) / C(n, k).

    Unbiased (Chen et al. 2021), and a product of ratios: no binomial grows. ``ValueError`` where ``n < k``.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of a task; there are {n}, {c} of them right.")
    return 1.0 if n - c < k else 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def figures(found: Sequence[Problem], verdicts: Iterable[Verdict], ks: Sequence[int]) -> dict[str, float]:
    """``pass@k`` as means over all problems; one without any answer counts as wrong."""
    counts = {problem.task_id: [0, 0] for problem in found}
    for verdict in verdicts:
        counts[verdict.task_id][0] += 1
        counts[verdict.task_id][1] += verdict.passed
    short = [(task, n) for task, (n, _) in counts.items() if 0 < n < max(ks)]
    if short:
        raise ValueError(
            f"pass@{max(ks)} needs {max(ks)} answers of a task, but {short[0][0]!r} has {short[0][1]}; lower k."
        )
    return {f"pass@{k}": sum(pass_at_k(n, c, k) if n else 0.0 for n, c in counts.values()) / len(counts) for k in ks}


def _code(answer: str, entry: str | None) -> str:
    """The fenced block that defines what is asked for, else the longest; or the whole answer."""
    text = answer.replace("\r\n", "\n").partition("[DONE]")[0].rpartition("[BEGIN]\n")[2]
    blocks = FENCED.findall(text)
    wanted = [block for block in blocks if entry and f"def {entry}" in block]
    return (wanted or sorted(blocks, key=len, reverse=True) or [text])[0]


def _strip_preamble(text: str) -> str:
    """Without the words that a chat model says before its code."""
    begin = re.search(r"^(?:(?:async def|def|class|import) \w|from [\w.]+ import |@\w)", text, re.MULTILINE)
    return text[begin.start() :] if _tree(text) is None and begin else text


def _tree(text: str) -> ast.Module | None:
    try:
        return _parse(text)
    except FAULTS:
        return None


def _parse(text: str) -> ast.Module:
    tree = ast.parse(text)
    compile(tree, "<answer>", "exec")  # sees more, such as a return outside of a function; nothing is run
    return tree


def _longest(text: str, least: int = 0) -> str:
    """The longest run of first lines that is Python; an answer is often cut within a line. ``text`` if none is."""
    lines = text.split("\n")
    while lines and len(cut := "\n".join(lines)) >= least:
        try:
            _parse(cut)
        except FAULTS as error:
            at = getattr(error, "lineno", None) or len(lines)
            del lines[max(0, min(at, len(lines)) - 1) :]
        else:
            return cut
    return text


def _quiet(text: str) -> str:
    """Without top-level assertions and calls of ``print``: what an answer says of itself is not asked for."""
    tree, lines = _tree(text), text.split("\n")
    for node in tree.body if tree else []:
        call = getattr(getattr(node, "value", None), "func", None) if isinstance(node, ast.Expr) else None
        if isinstance(node, ast.Assert) or getattr(call, "id", None) == "print":
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)
