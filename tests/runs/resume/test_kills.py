"""SIGKILL at fifty moments, in training, in evaluation and while checkpoints are written: the bits stay the same.

The process that runs the tests is warm; a child that is forked from it for each attempt needs no imports. The first
tier has some of the moments, the second has all.
"""

import os
import random
import signal
import sys
import time
import traceback

import pytest
import torch

import fedlora
from fedlora.runs.folder import RunFolder
from tests.fixtures.resume import alike, small

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]
SOME = {"fedit": 3, "fedsa-lora": 3, "fedex-lora": 4, "ravan": 3}
KILLS = {"fedit": 13, "fedsa-lora": 13, "fedex-lora": 12, "ravan": 12}
SETTINGS = ("rounds=5", "training.keep_optimizer=true", "evaluation.measure=false", "clients.per_round=2")
CALLS = ("fsync", "replace", "unlink", "open")


def test_fifty():
    assert sum(KILLS.values()) == 50


@pytest.fixture(autouse=True)
def one_thread():
    """A forked child crashes where it uses threads that its parent has started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_the_bits_of_a_run_that_was_never_killed(name, tmp_path):
    killed(name, KILLS[name], tmp_path)


@pytest.mark.parametrize("name", SOME)
def test_the_bits_of_a_run_that_was_killed_a_few_times(name, tmp_path):
    killed(name, SOME[name], tmp_path)


def killed(name, times, tmp_path):
    """Kills runs so many times, and compares each that comes to its end."""
    draws, settings = random.Random(name), small(name, *SETTINGS)
    began = time.monotonic()
    fedlora.run(settings, tmp_path / "whole")
    took = time.monotonic() - began
    kills = attempts = finished = 0
    while kills < times:
        folder = tmp_path / f"run-{finished}"
        attempts += 1
        assert attempts < 8 * times, "the children end before they are killed"
        # In turn: at any time at all, and at one of the calls that write, of which a round has about a dozen.
        pid = child(settings, folder, call=draws.randrange(1, 24) if attempts % 2 else None)
        if not attempts % 2:
            time.sleep(draws.uniform(0.02, 0.5) * took)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
        else:
            assert os.WEXITSTATUS(status) == 0
        if RunFolder(folder).is_finished(settings.rounds):  # also where it was killed after the last file was written
            assert alike(folder, tmp_path / "whole")
            finished += 1
    folder = tmp_path / f"run-{finished}"
    if (folder / "config.toml").exists():
        fedlora.resume(folder)
        assert alike(folder, tmp_path / "whole")
        assert not list(folder.rglob(".*")), "what was half written is cleared away"


def child(settings, folder, call=None):
    """Begins the run or goes on with it in a process of its own, killed at its ``call``-th writing call."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if call is not None:
            dying_at(call)
        if (folder / "config.toml").exists():
            fedlora.resume(folder)
        else:
            fedlora.run(settings, folder)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def dying_at(number):
    """From now on, the process kills itself at this one of the calls that write, before or after it takes effect."""
    left = [number]

    def counted(real):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0 and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*arguments, **options)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
