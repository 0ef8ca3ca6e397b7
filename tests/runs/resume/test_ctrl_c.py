"""Ctrl-C in processes of their own: once after the step that is under way, twice at once; and a disk that is full.

The first process is a real one from its start; those that go on are forked from the command server.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedlora.schema import dumps
from tests.fixtures.federation import config

WAIT = 600.0  # seconds, of which importing torch may take most on a busy machine
# In a child of the command server: Ctrl-C as in a terminal, a file that says who it is, and a limit on files' size.
CHILD = """
import os, resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
else:
    open("pid.new", "w").write(str(os.getpid()))
    os.rename("pid.new", "pid")
sys.argv = ["fedlora", *sys.argv[2:]]
from fedlora.cli import main
main()
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "my.toml").write_text(dumps(config("rounds=3").table))
    return tmp_path


@pytest.fixture
def child(commands, place):
    """Runs the command in a child of the server, whose files may be no larger than a limit."""

    def call(*arguments, limit=0):
        return commands.call(["python", "-c", CHILD, str(limit), *arguments], place, seconds=WAIT)

    return call


def rounds(place):
    file = place / "r" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_once_twice_and_going_on(place, child):
    done = interrupted_once(place)

    found = []
    thread = threading.Thread(target=lambda: found.append(child("resume", "r")))
    thread.start()
    until(lambda: (place / "pid").exists() or not thread.is_alive())
    pid = int((place / "pid").read_text())
    until(lambda: rounds(place) > done + 1 or not thread.is_alive())
    assert thread.is_alive(), found
    os.kill(pid, signal.SIGINT)
    time.sleep(0.01)  # two at once would be one
    os.kill(pid, signal.SIGINT)
    thread.join(WAIT)
    assert found[0].returncode == 130 and "Traceback" not in found[0].stderr

    end = rounds(place) + 2
    went = child("resume", "r", "--rounds", str(end), "--json")
    assert went.returncode == 0, went.stderr
    summary = json.loads(went.stdout)
    assert summary["rounds"] == end == rounds(place) and summary["resumed"][0] == done
    assert not summary["interrupted"]


def interrupted_once(place: Path) -> int:
    """A real process that is interrupted after two rounds or more; how many it came to."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlora", "run", "my.toml", "-o", "rounds=5000", "--out", "r"],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        until(lambda: rounds(place) >= 2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "stopping after this step; Ctrl-C again leaves at once" in stderr
    done = json.loads((place / "r" / "summary.json").read_text())["rounds"]
    assert f"Stopped after {done} of 5000 rounds; what was finished is in r: `fedlora resume r` goes on." in stderr
    assert done == rounds(place) >= 2
    return done


def test_a_full_disk_is_one_sentence_and_status_2(place, child):
    found = child("run", "my.toml", "--out", "r", limit=4_000)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == (
        "fedlora: the disk is full: 'r' keeps every round that was finished; free some space, and `fedlora resume r` "
        "goes on.\n"
    )
    found = child("resume", "r", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["rounds"] == 3
    found = child("resume", "r")
    assert (
        found.returncode == 2 and found.stderr.count("\n") == 1 and "holds a finished run of 3 rounds" in found.stderr
    )
