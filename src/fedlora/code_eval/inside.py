"""The script that ``Sandbox`` starts: it confines itself, runs a program and then its tests, and reports the outcome.

It reads its task as JSON from descriptor 0, and answers on the descriptor given as argument: ``!`` and a reason if it
could not confine itself and ran nothing; else ``+``, followed by the token after the last test, or by ``-`` and the
error. A program that ends early in any way has not written the token.
"""

import json
import os
import sys
import types
from contextlib import suppress
from functools import partial

PROGRAM, TESTS = "<program>", "<tests>"


class Reporter:
    """A context around the program and its tests: reports how they ended, and ends the process at once."""

    def __init__(self, descriptor: int, token: str, tests: str):
        self._flushes = sys.stdout.flush, sys.stderr.flush
        self._write, self._exit = partial(os.write, descriptor), os._exit  # the program may replace the originals
        self._token, self._tests = token, tests.splitlines()

    def __enter__(self) -> "Reporter":
        self._write(b"+")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        answer = self._token if error is None else "-" + self._describe_error(kind, error, trace)
        for flush in self._flushes:
            with suppress(OSError, ValueError):  # the program may have closed them
                flush()
        self._write(answer.encode("utf-8", "replace")[:2000])
        self._exit(0)

    def _describe_error(self, kind: type | None, error: BaseException, trace: types.TracebackType | None) -> str:
        """Return the last line of Python's traceback, and the test that raised the error."""
        line = ""
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == TESTS and trace.tb_lineno <= len(self._tests):
                line = self._tests[trace.tb_lineno - 1].strip()
            trace = trace.tb_next
        text = f"{getattr(kind, '__name__', '')}: {error}".removesuffix(": ")
        return f"{text} in {line}" if line else text


def confine_process(descriptor: int, task: dict) -> None:
    """Confine this process, or report the reason on ``descriptor`` and end."""
    library = list(sys.path)  # the interpreter's own at its start
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import kernel  # a neighbouring file: the package fedlora is not on the path here

    try:
        kernel.confine(os.getcwd(), [*library, *task["readable"]], task["limits"], task["parent"])
    except (OSError, ValueError, KeyError) as error:
        os.write(descriptor, f"!{error}".encode())
        os._exit(1)
    sys.path[:] = [*library, *task["packages"]]
    for name in ("kernel", "syscalls"):
        del sys.modules[name]


def run_program(program: str, tests: str) -> None:
    """Run the program and then its tests in one module, which is not ``__main__``.

    They are compiled one by one, so an unfinished text in the program cannot swallow the tests.
    """
    space = types.ModuleType("program")
    sys.modules["program"] = space  # dataclasses look their module up
    sys.argv[:] = ["program"]
    exec(compile(program, PROGRAM, "exec"), space.__dict__)
    exec(compile(tests, TESTS, "exec"), space.__dict__)


if __name__ == "__main__":
    with open(0, encoding="utf-8") as file:
        task = json.load(file)
    os.open(os.devnull, os.O_RDONLY)  # takes the place of descriptor 0
    descriptor = int(sys.argv[1])
    confine_process(descriptor, task)
    with Reporter(descriptor, task.pop("token"), task["tests"]):
        run_program(task["program"], task["tests"])
