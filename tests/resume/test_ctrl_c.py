"""Ctrl-C in real processes: once after the step that is under way, twice at once; and a disk that is full."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from tests.test_cli import TOML

WAIT = 600.0  # seconds, of which importing torch may take most on a busy machine


@pytest.fixture
def place(tmp_path):
    (tmp_path / "my.toml").write_text(TOML)
    yield tmp_path
    for process in running:
        process.kill()
        process.communicate()
    running.clear()


running: list[subprocess.Popen] = []


def started(place, *arguments, limit=None):
    def prepare():
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = subprocess.Popen(
        [sys.executable, "-m", "fedlora", *arguments], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=prepare, env=dict(os.environ),
    )  # fmt: skip
    running.append(process)
    return process


def rounds(place):
    file = place / "r" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_once_twice_and_going_on(place):
    process = started(place, "run", "my.toml", "-o", "rounds=5000", "-o", "training.local_steps=3", "--out", "r")
    until(lambda: rounds(place) >= 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "stopping after this step; Ctrl-C again leaves at once" in stderr
    done = json.loads((place / "r" / "summary.json").read_text())["rounds"]
    assert f"Stopped after {done} of 5000 rounds; what was finished is in r: `fedlora resume r` goes on." in stderr
    assert done == rounds(place) >= 2

    process = started(place, "resume", "r")
    until(lambda: rounds(place) > done + 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)  # two at once would be one
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 130 and "Traceback" not in stderr

    end = rounds(place) + 2
    process = started(place, "resume", "r", "--rounds", str(end), "--json")
    stdout, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 0, stderr
    summary = json.loads(stdout)
    assert summary["rounds"] == end == rounds(place) and summary["resumed"][0] == done
    assert not summary["interrupted"]


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_status_2(place):
    process = started(place, "run", "my.toml", "-o", "rounds=3", "--out", "r", limit=10_000)
    stdout, stderr = process.communicate(timeout=WAIT)
    assert (process.returncode, stdout) == (2, "")
    assert stderr == (
        "fedlora: the disk is full: 'r' keeps every round that was finished; free some space, and `fedlora resume r` "
        "goes on.\n"
    )
    process = started(place, "resume", "r", "--json")
    stdout, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["rounds"] == 3
    process = started(place, "resume", "r")
    _, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 2 and stderr.count("\n") == 1 and "holds a finished run of 3 rounds" in stderr
