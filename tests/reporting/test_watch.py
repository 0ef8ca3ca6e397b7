"""``fedlora watch``: on a real terminal, in a pipe, while a run goes on, and after whatever became of it."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from copy import deepcopy

import pytest

from fedlora.engines.loop import Event
from fedlora.reporting import watch as watching
from fedlora.runs import progress_writer as pulse
from fedlora.runs.callbacks import Start
from fedlora.runs.progress_file import ProgressReader, RunStatus, is_running, process_id, replace_json
from tests.fixtures.resume import small
from tests.fixtures.terminal import on_pty

NOW = 1000.0
PROGRESS = {
    "form": 1, "state": "running", **process_id(), "title": "FedIT", "metric": "accuracy", "began": NOW - 65, "rounds": 4,
    "clients": 3, "cohort": 3, "round": 3, "doing": "step", "client": 1, "answered": 1, "loss": 1.25,
    "said": ["round 1: client 2: quarantined: nan"], "at": NOW,
}  # fmt: skip


def record(number, **more):
    return {
        "round": number, "cohort": [0, 1], "loss": {"0": 2.0 / number}, "global": {"accuracy": 0.1 * number, "loss": 1},
        "clients": {"mean": 0.2 * number, "examples_mean": 0.2, "worst": 0.1, "spread": 0.0, "each": [0.1]},
        "weights": {"w": {"served": 0.03}}, "bytes": {"up": {"adapter": 2_000_000}, "down": {"adapter": 1_500_000}},
        "privacy": {"epsilon": 1.5 * number}, "seconds": {"total": 10.0}, **more,
    }  # fmt: skip


def folder_of(path, progress=PROGRESS, records=()):
    path.mkdir(exist_ok=True)
    replace_json(path / "progress.json", progress)
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def text_of(at, width=100, height=30, name="runs/a"):
    import io

    from fedlora.reporting.terminal import PlainConsole

    out = io.StringIO()
    PlainConsole(file=out, width=width, force_terminal=False).print(watching.draw_status(at, name, width, height, NOW))
    return out.getvalue()


def test_what_is_shown():
    at = RunStatus("running", PROGRESS, [record(1, quarantined={"2": "nan"}), record(2)])
    text = text_of(at, 150)
    assert (
        "runs/a, FedIT" in text
        and "2 of 4 rounds; round 3: training, client 1, 1 of 3 clients answered, loss 1.2500" in text
    )
    assert "65 s so far, about 20 s left" in text
    heads = (
        "round",
        "own accuracy",
        "loss",
        "global accuracy",
        "worst",
        "error",
        "MB up",
        "MB down",
        "clients",
        "quarantined",
        "ε",
    )
    row = next(line for line in text.splitlines() if re.match(r" *1  ", line))
    assert all(head in text for head in heads)
    assert row.split() == [
        "1",
        "0.2000",
        "2.0000",
        "0.1000",
        "0.1000",
        "3.0e-02",
        "2.00",
        "1.50",
        "2",
        "1",
        "1",
        "1.50",
        "10.0",
    ]
    assert "quarantined: nan" in text and "▁█" in text


@pytest.mark.parametrize("width", [20, 32, 48, 80])
def test_a_narrow_terminal_shows_what_fits_and_cuts_no_figure(width):
    text = text_of(RunStatus("running", PROGRESS, [record(1), record(2)]), width)
    assert max(map(len, text.splitlines())) <= width
    row = next(line for line in text.splitlines() if re.match(r" *2 +\d", line))
    assert all(re.fullmatch(r"[\d.e+-]+|–", cell) for cell in row.split())
    assert "0.4000" in row, "the first figure is the clients' own"
    assert "2 of 4 rounds" in " ".join(text.split()) and "about 20 s left" in " ".join(text.split())
    assert re.search("━ *\n", text), "the bar has a line of its own"


def test_many_rounds_leave_the_head_on_the_screen():
    at = RunStatus("running", {**PROGRESS, "rounds": 300}, [record(n) for n in range(1, 201)])
    assert len(text_of(at, 80, 24).splitlines()) <= 24
    assert re.search(r"^ *200 ", text_of(at, 80, 24), re.M)


def test_hostile_names_are_text():
    said = {**PROGRESS, "title": "[red]x[/red]\x1b[2J", "said": ["client 1: \x1b]0;owned\x07[link=http://x]y[/link]"]}
    text = text_of(RunStatus("running", said, [record(1)]), 120, name="runs/\x1b[31m[b]a")
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]x[/red]" in text and "[link=http://x]y[/link]" in text and "[b]a" in text


def test_states(tmp_path):
    following = ProgressReader(tmp_path / "run")
    assert following.read().state == "waiting"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert following.read().state == "loading"
    folder_of(tmp_path / "run", records=[record(1)])
    assert (following.read().state, len(following.read().records)) == ("running", 1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    replace_json(tmp_path / "run" / "progress.json", {**PROGRESS, "pid": gone.pid})
    assert following.read().state == "broken off"
    assert is_running({**PROGRESS, "pid": gone.pid, "host": "elsewhere"}), "nobody can know of another machine"
    assert not is_running({**PROGRESS, "born": "1"}), "the number belongs to another process now"
    replace_json(tmp_path / "run" / "progress.json", {**PROGRESS, "state": "failed", "error": "too large"})
    assert following.read().is_over and "failed after 1 of 4 rounds: too large" in watching.describe_state(
        following.read()
    )
    (tmp_path / "run" / "comparison.json").write_text("{}")
    with pytest.raises(ValueError, match="is a comparison; name the folder of one of its runs"):
        following.read()


def test_metrics_are_read_once_and_anew_where_a_run_goes_on(tmp_path):
    path, following = tmp_path / "metrics.jsonl", ProgressReader(tmp_path)
    path.write_text(json.dumps(record(1)) + "\n" + '{"round": 2, "cut')
    assert [r["round"] for r in following.read().records] == [1]
    with open(path, "a") as file:
        file.write(' off": 0}\n')
    assert [r["round"] for r in following.read().records] == [1, 2]
    aside = tmp_path / "new"
    aside.write_text(json.dumps(record(1)) + "\n")
    os.replace(aside, path)  # as a run does that goes on from an earlier round
    assert [r["round"] for r in following.read().records] == [1]


def test_time_left():
    at = RunStatus("running", PROGRESS, [record(1, seconds={"total": 4.0}), record(2, seconds={"total": 8.0})])
    assert watching.estimate_remaining(at, NOW) == 12 and watching.estimate_remaining(at, NOW + 5) == 7
    assert watching.estimate_remaining(at, NOW + 50) == 0
    assert watching.estimate_remaining(RunStatus("running", PROGRESS, []), NOW) is None
    assert [watching.format_duration(s) for s in (8, 100, 7000)] == ["8 s", "2 min", "1:57 h"]


def test_the_file_is_written_seldom_and_cheaply(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(pulse, "replace_json", lambda path, value: written.append(value))
    one = pulse.ProgressWriter(tmp_path)
    monkeypatch.setattr(pulse, "INTERVAL", 3600.0)
    one._state, one._last_write = {"form": 1}, time.monotonic()
    for client in range(1000):
        one.on_event(Event("step", 0, client))
        one.on_event(Event("turn", 0, client, 0.5))
    assert not written
    one.on_event(Event("quarantined", 0, 7, text="quarantined: nan"))
    assert written[-1]["answered"] == 1000 and written[-1]["said"] == ["round 1: client 7: quarantined: nan"]
    one.on_round({"round": 1})
    assert len(written) == 2 and written[-1]["answered"] == 0 and written[-1]["round"] == 2


def test_who_is_left_out_now_is_said_until_it_is_back(tmp_path, monkeypatch):
    """Client 2 dies in round 3, client 0 is quarantined there; in round 4 client 0 is back."""
    one = pulse.ProgressWriter(tmp_path)
    monkeypatch.setattr(pulse, "INTERVAL", 0.0)
    one._state = deepcopy({**PROGRESS, "rounds": 5})
    records = [record(n, clients={"mean": 0.5, "each": [0.5, 0.5, 0.5]}) for n in (1, 2)]

    def shown():
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        return " ".join(text_of(ProgressReader(tmp_path).read(), 150).split())

    one.on_event(Event("step", 2, 0))
    assert "left out" not in shown().partition("seconds")[0] and "mean over" not in shown()
    one.on_event(Event("turn", 2, 0, 0.5))
    one.on_event(Event("quarantined", 2, 0, text="quarantined: nan"))
    one.on_event(Event("absent", 2, 2, text="its node was gone"))
    now = "left out now: client 0 since round 3, quarantined: nan; client 2 since round 3, absent: its node was gone"
    assert now in shown(), "before the round is over"
    gone = {"absent": {"2": "its node was gone"}, "unscored": {"2": "not here"}}
    records.append(record(3, clients={"mean": 0.5, "each": [0.5, 0.5, None]}, quarantined={"0": "nan"}, **gone))
    one.on_round(records[-1])
    assert all(text in shown() for text in ("client 2 since round 3, absent: its node was gone", "client 0 since"))
    assert "clients' own models: mean over 2 of 3 clients in round 3" in shown() and "not scored" in shown()
    one.on_event(Event("turn", 3, 0, 0.5))
    assert "left out now: client 2 since round 3, absent: its node was gone clients' own" in shown(), "client 0 is back"
    records.append(record(4, clients={"mean": 0.5, "each": [0.5, 0.5, None]}, **gone))
    one.on_round(records[-1])
    assert "client 2 since round 3" in shown() and "in rounds 3–4" in shown()
    one.on_event(Event("turn", 4, 2, 0.5))
    assert "left out now" not in shown()
    line = watching.format_round(records[2], 5, "accuracy")
    assert line.endswith("; client 2 absent and not scored, client 0 quarantined")
    one.on_event(Event("absent", 4, 2, text="\x1b[2J"))
    assert "\x1b" not in shown()


def test_many_that_are_left_out_are_counted(tmp_path, monkeypatch):
    one = pulse.ProgressWriter(tmp_path)
    monkeypatch.setattr(pulse, "INTERVAL", 0.0)
    one._state = deepcopy(PROGRESS)
    for client in range(500):
        one.on_event(Event("absent", 0, client))
    text = " ".join(text_of(ProgressReader(tmp_path).read(), 150).split())
    assert "client 7 since round 1, absent: dropped out (clients.dropout); and 492 more clients" in text
    assert len((tmp_path / "progress.json").read_text()) < 2000


def test_a_run_that_goes_on_knows_who_was_left_out_before(tmp_path):
    made = small("fedit")
    before = [record(1, absent={"1": "late"}), record(2, absent={"1": "late"})]
    pulse.ProgressWriter(tmp_path).on_start(Start(made, tmp_path, before, print))
    assert ProgressReader(tmp_path).read().progress["missing"] == {
        "count": 1,
        "first": ["client 1 since round 1, absent: late"],
    }


WRITER = """
import json, sys, time
from pathlib import Path
from fedlora.runs.progress_file import process_id, replace_json
place = Path(sys.argv[1]); place.mkdir()
progress, record = json.loads(sys.argv[2]), json.loads(sys.argv[3])
progress |= {**process_id(), "began": time.time(), "rounds": 3, "said": []}
for number in (1, 2, 3):
    replace_json(place / "progress.json", {**progress, "round": number, "at": time.time()})
    sys.stdin.readline()
    with open(place / "metrics.jsonl", "a") as file: file.write(json.dumps({**record, "round": number}) + "\\n")
replace_json(place / "progress.json", {**progress, "state": "finished", "round": 4, "at": time.time()})
"""


def a_run(path):
    """A run of three rounds; each ends when it is told to (``go``)."""
    command = [sys.executable, "-c", WRITER, str(path), json.dumps(PROGRESS), json.dumps(record(1))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_on_a_terminal_it_waits_draws_and_ends_with_the_run(tmp_path):
    begun = []
    text, code = on_pty(
        ["-m", "fedlora", "watch", str(tmp_path / "run"), "--every", "0.1"], 70, 20,
        at=[("waiting for the run to begin", lambda: begun.append(a_run(tmp_path / "run"))),
            *((f"{n} of 3 rounds", lambda: go(begun[0])) for n in range(3))],
    )  # fmt: skip
    begun[0].communicate()
    assert begun[0].returncode == 0 and code == 0
    assert set(re.findall(r"(\d) of 3 rounds", text)) == set("0123"), "it was drawn again as rounds went by"
    before, _, after = text.partition("\x1b[?1049l")  # the other screen is left
    assert "\x1b[?1049h" in before and "finished after 3 of 3 rounds" in after, "left standing at the end"


def test_ctrl_c_leaves_and_harms_nothing(tmp_path):
    folder_of(tmp_path / "run")
    text, code = on_pty(["-m", "fedlora", "watch", str(tmp_path / "run")], 100, at=[("0 of 4 rounds", b"\x03")])
    assert code == 0 and "The run goes on" in text and "Traceback" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


INTERRUPTED = """
import rich.live
drawn = rich.live.Live.refresh
def interrupted(self):
    drawn(self)
    raise KeyboardInterrupt
rich.live.Live.refresh = interrupted
"""
WATCHED = INTERRUPTED + "from fedlora.cli import main; main()"
BAR = (
    INTERRUPTED
    + """
from fedlora.runs.progress import Progress
try:
    Progress(2).__enter__()
except KeyboardInterrupt:
    print("left")
"""
)


def test_ctrl_c_in_the_first_drawing_gives_the_cursor_back_too(tmp_path):
    folder_of(tmp_path / "run")
    text, code = on_pty(["-c", WATCHED, "watch", str(tmp_path / "run")], 100)
    assert code == 0 and "0 of 4 rounds" in text and "The run goes on" in text and "\x1b[?1049l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    text, code = on_pty(["-c", BAR], 100)
    assert code == 0 and "left" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_in_a_pipe_it_prints_lines(tmp_path):
    process, lines = a_run(tmp_path / "run"), []
    command = [sys.executable, "-m", "fedlora", "watch", str(tmp_path / "run"), "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching_it:
        late = threading.Timer(240, watching_it.kill)
        late.start()
        go(process)
        for line in watching_it.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("round ") and not line.startswith("round 3"):
                go(process)
    late.cancel()
    process.communicate()
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.partition(":")[0] for line in rounds] == [f"round {n} of 3" for n in (1, 2, 3)]
    assert "own accuracy 0.2000" in rounds[0] and "\x1b" not in "".join(lines)
    assert (watching_it.returncode, lines[-1]) == (0, "finished after 3 of 3 rounds")


def test_a_run_that_failed_is_exit_status_1(tmp_path):
    folder_of(tmp_path / "run", {**PROGRESS, "state": "failed", "error": "too large"})
    found = subprocess.run([sys.executable, "-m", "fedlora", "watch", str(tmp_path / "run")],
                           capture_output=True, text=True, timeout=240, check=False)  # fmt: skip
    assert found.returncode == 1 and "the run is failed" in found.stderr and "Traceback" not in found.stderr
