"""The ``flwr`` command, asked from Python: one process a question, JSON as its answer."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedlora.flower.deploy.environment import LAST, plain, tail
from fedlora.flower.deploy.process_group import Family

CONNECTION = "loopback"  # the name of the SuperLink in Flower's own config.toml
COMMAND = "flwr"
AWAY = 30.0  # seconds that a SuperLink may be unreachable while a run's end is waited for
STARTED = re.compile(r"Successfully started run (\d+)")


class Control:
    """What ``flwr`` can tell and do; its processes belong to the family, which stops them with the others."""

    def __init__(self, family: Family, program: Path):
        self.family, self.program = family, program

    def stream(
        self, arguments: list[str], watch: Callable[[str], None], timeout: float | None
    ) -> tuple[int | None, int, list[str]]:
        """The run's number, how ``flwr run`` ended, and its last lines."""
        number, lines = None, []
        process = self._flwr(*arguments)
        timer = threading.Timer(timeout or 0, process.terminate)
        if timeout is not None:
            timer.start()
        try:
            for raw in process.stdout:
                line = plain(raw.rstrip("\r\n"))
                lines = [*lines[-LAST:], line]
                if number is None and (found := STARTED.search(line)):
                    number = int(found[1])
                watch(line)
        finally:
            timer.cancel()
            process.stdout.close()
        return number, process.wait(), lines

    def finished(self, number: int, until: float) -> str:
        """The run's final status; the log's stream may end before the run does."""
        while not (run := self._state(number))["status"].startswith("finished"):
            if time.monotonic() >= until:
                with suppress(ChildProcessError):  # it may finish meanwhile
                    self.call("stop", str(number), CONNECTION)
            time.sleep(0.5)
        details = run["status-details"]
        return run["status"] if details in ("", "N/A") else f"{run['status']}: {details}"

    def _state(self, number: int) -> dict[str, str]:
        """What became of a run so far; a SuperLink that is being restarted is given time to come back."""
        until = time.monotonic() + AWAY
        while True:
            try:
                return self.call("list", CONNECTION, "--run-id", str(number))["runs"][0]
            except ChildProcessError:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _flwr(self, *arguments: str, **options) -> subprocess.Popen:
        command = [str(self.program), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        return self.family.start(COMMAND, command, text=True, encoding="utf-8", errors="replace", **pipes)

    def call(self, *arguments: str) -> dict:
        """What a ``flwr`` command answers."""
        with self._flwr(*arguments, "--format", "json", stderr=subprocess.PIPE) as process:
            answer, words = process.communicate()
        found = _json(answer)
        if not found.get("success"):
            what = found.get("error-message") or tail((answer + words).splitlines())
            raise ChildProcessError(f"`flwr {' '.join(arguments)}` failed: {' '.join(what.split())}")
        return found


def _json(text: str) -> dict:
    start = text.find("{")
    try:
        return json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
