"""Started by ``Sandbox`` as a script: shuts itself in, runs a program and then its tests, and says how it went.

It finds what to do as JSON on descriptor 0 and answers on the descriptor that its argument names: ``!`` and a reason
where it could not shut itself in and ran nothing; else ``+``, and then either the token, once the last test has run, or
``-`` and what went wrong. Whoever ends early, by whatever way, has not written the token.
"""

import json
import os
import sys
import types
from contextlib import suppress
from functools import partial

PROGRAM, TESTS = "<program>", "<tests>"


class Verdict:
    """Around program and tests: what ends them goes to the grader, and the process ends at once."""

    def __init__(self, descriptor: int, token: str, tests: str):
        self._flushes = sys.stdout.flush, sys.stderr.flush
        self._write, self._exit = partial(os.write, descriptor), os._exit  # whatever the program puts in their place
        self._token, self._tests = token, tests.splitlines()

    def __enter__(self) -> "Verdict":
        self._write(b"+")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        answer = self._token if error is None else "-" + self._describe_error(kind, error, trace)
        for flush in self._flushes:
            with suppress(OSError, ValueError):  # closed by the program
                flush()
        self._write(answer.encode("utf-8", "replace")[:2000])
        self._exit(0)

    def _describe_error(self, kind: type | None, error: BaseException, trace: types.TracebackType | None) -> str:
        """The error as Python's last line has it, and the test that met it."""
        line = ""
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == TESTS and trace.tb_lineno <= len(self._tests):
                line = self._tests[trace.tb_lineno - 1].strip()
            trace = trace.tb_next
        text = f"{getattr(kind, '__name__', '')}: {error}".removesuffix(": ")
        return f"{text} in {line}" if line else text


def begin() -> tuple[int, dict]:
    """The verdict's descriptor and the task; descriptor 0 is at the end of nothing afterwards."""
    with open(0, encoding="utf-8") as file:
        task = json.load(file)
    os.open(os.devnull, os.O_RDONLY)  # takes the place of descriptor 0
    return int(sys.argv[1]), task


def shut_in(verdict: int, task: dict) -> None:
    """Confines this process, or says why not and ends it."""
    library = list(sys.path)  # the interpreter's own, as it was started
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import kernel  # a neighbour, not ``fedlora.code_eval.kernel``: nothing of the package is on the path here

    try:
        kernel.confine(os.getcwd(), [*library, *task["readable"]], task["limits"], task["parent"])
    except (OSError, ValueError, KeyError) as error:
        os.write(verdict, f"!{error}".encode())
        os._exit(1)
    sys.path[:] = [*library, *task["packages"]]
    for name in ("kernel", "syscalls"):
        del sys.modules[name]


def run(program: str, tests: str) -> None:
    """Both in one namespace, a module that is not ``__main__``; a program's text cannot swallow the tests'."""
    space = types.ModuleType("program")
    sys.modules["program"] = space  # dataclasses look their module up
    sys.argv[:] = ["program"]
    exec(compile(program, PROGRAM, "exec"), space.__dict__)
    exec(compile(tests, TESTS, "exec"), space.__dict__)


if __name__ == "__main__":
    descriptor, task = begin()
    shut_in(descriptor, task)
    with Verdict(descriptor, task.pop("token"), task["tests"]):
        run(task["program"], task["tests"])
