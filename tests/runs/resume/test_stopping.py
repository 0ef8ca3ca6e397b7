"""Ctrl-C once and twice, in this process, at moments that are known exactly."""

import os
import signal
import threading

import pytest

import fedlora
from tests.fixtures.resume import alike, like_reference, small

SELDOM = "checkpoint.every=3"


@pytest.fixture(autouse=True)
def default():
    """As in a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressing(kind, round, times=1):
    """Presses Ctrl-C at the first such event, and notes every event."""
    seen = []

    def watch(event):
        seen.append(event)
        if event.kind == kind and event.round == round and not any(e.kind == "pressed" for e in seen):
            seen.append(type(event)("pressed", round))
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return watch, seen


@pytest.mark.parametrize(("kind", "left"), [("step", 2), ("turn", 2), ("evaluation", 3), ("round", 3)])
def test_once(kind, left, tmp_path, reference):
    """During a turn the round is dropped; later in a round it is finished first. Either way it is saved."""
    settings, (watch, seen) = like_reference("fedex-lora", SELDOM), pressing(kind, 2)
    result = fedlora.run(settings, tmp_path / "run", watch)
    assert result.summary["interrupted"] and result.summary["rounds"] == left
    after = seen[[e.kind for e in seen].index("pressed") + 1 :]
    assert not [e for e in after if e.kind in ("step", "turn")], "nothing else is begun"
    assert [int(p.name[:6]) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == [left], "out of turn"
    fedlora.resume(tmp_path / "run")
    assert alike(tmp_path / "run", reference("fedex-lora").folder)


@pytest.mark.parametrize("kind", ["step", "evaluation"])
def test_twice_leaves_at_once_and_writes_nothing_more(kind, tmp_path, reference):
    settings, (watch, seen) = like_reference("fedex-lora"), pressing(kind, 1, times=2)
    with pytest.raises(SystemExit) as left:
        fedlora.run(settings, tmp_path / "run", watch)
    assert left.value.code == 130
    assert seen[-1].kind == "pressed"
    assert not (tmp_path / "run" / "summary.json").exists()
    fedlora.resume(tmp_path / "run")
    assert alike(tmp_path / "run", reference("fedex-lora").folder)


def test_after_the_last_step_the_run_is_whole_and_what_follows_is_stopped(tmp_path, reference):
    watch, _ = pressing("round", 3)
    with pytest.raises(KeyboardInterrupt):
        fedlora.run(like_reference("fedit", SELDOM), tmp_path / "run", watch)
    assert alike(tmp_path / "run", reference("fedit").folder)


def test_a_program_with_a_handler_of_its_own_keeps_it(tmp_path):
    told = []
    signal.signal(signal.SIGINT, lambda *_: told.append(1))
    watch, _ = pressing("step", 0)
    result = fedlora.run(small("fedit", "rounds=1"), watch=watch)
    assert told == [1] and not result.summary["interrupted"]


def test_in_another_thread_signals_are_left_alone():
    found = []
    thread = threading.Thread(target=lambda: found.append(fedlora.run(small("fedit", "rounds=1"))))
    thread.start()
    thread.join()
    assert found[0].summary["rounds"] == 1
