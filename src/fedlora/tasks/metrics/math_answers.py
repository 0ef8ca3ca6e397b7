"""Mathematical answers in LaTeX, compared by math-verify in a process of its own, so that no text can hang a run."""

import json
import queue
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

WORKER = Path(__file__).with_name("_math_worker.py")
START = 120.0  # seconds for the imports of SymPy, on a busy machine
SECONDS = 10.0  # for one answer; MATH's take milliseconds


class MathGrader:
    """Compares answers, as a context manager that ends its process.

    It works in any thread and any process. An answer that takes more than ``seconds`` is wrong; the process is then
    killed, and the next answer starts another.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        if find_spec("math_verify") is None:
            raise ValueError(
                "task.answer is 'math', which needs math-verify, which is not installed: pip install 'fedlora[llm]'."
            )
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def is_answer(self, gold: str) -> bool:
        """Whether a right answer has a mathematical expression in it."""
        return self._ask(None, gold)

    def is_equal(self, text: str, gold: str) -> bool:
        """Whether the answer of a text, such as its last box, equals that of ``gold``."""
        return self._ask(text, gold)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, text: str | None, gold: str) -> bool:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([text, gold]) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=self.seconds)
        except (queue.Empty, BrokenPipeError):
            line = ""
        if not line:  # too long, or the process ended, for instance because it took too much memory
            self.close()
            return False
        return bool(json.loads(line))

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
        self._process, self._lines = process, queue.Queue()
        threading.Thread(target=_read_lines, args=(process, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=START)
        except queue.Empty:
            ready = ""
        if ready.strip() != "ready":
            self.close()
            raise RuntimeError("math-verify does not start; run `python -c 'import math_verify'` to see why.")
        return process


def _read_lines(process: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
    """Put the lines of a process into a queue, and an empty one when it ends."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except ValueError:  # closed while it is read
        pass
    lines.put("")
