"""Own callbacks: called in order with what they were promised, and heard when they raise."""

import json

import pytest

from fedlora.runs import callbacks
from fedlora.runs import resume as resuming
from fedlora.runs import run as runs
from fedlora.runs.callbacks import CallbackError, Callbacks, End
from fedlora.runs.record import round_figures
from fedlora.schema import ConfigError, flatten_table
from tests.fixtures.callbacks import RECORD, Notes
from tests.fixtures.resume import alike, small


class Raises:
    """Extends nothing, and has one method."""

    def __init__(self, error, round=2):
        self.error, self.round, self.end = error, round, None

    def on_round(self, record):
        if record["round"] == self.round:
            raise self.error

    def on_end(self, end):
        self.end = end


def test_hooks_come_in_order_and_after_what_they_tell_is_on_disk(tmp_path):
    class OnDisk:
        def on_round(self, record):
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["round"] == record["round"]
            assert list((tmp_path / "run" / "checkpoints").glob(f"{record['round']:06d}-*"))

    notes = Notes()
    result = runs.run_config(
        small("fedit", "rounds=2", "evaluation.every=2"), tmp_path / "run", callbacks=[OnDisk(), notes]
    )
    told = [x for x in notes.seen if x[0] in ("start", "on_round", "on_evaluation", "end")]
    assert told == [
        ("start", 0), ("on_round", 1), ("on_round", 2),
        ("on_evaluation", 2, result.records[1]["clients"]["mean"]), ("end", "finished"),
    ]  # fmt: skip
    turns = [x for x in notes.seen if x[0] == "turn"]
    assert turns == [("turn", r) for r in (1, 2) for _ in range(3)]


def test_a_callback_that_raises_stops_the_run_and_loses_nothing(tmp_path):
    config, broken = small("fedsa-lora", "rounds=3", "checkpoint.every=3"), Raises(ZeroDivisionError("by nought"))
    with pytest.raises(CallbackError, match=r"Raises\.on_round raised ZeroDivisionError in round 2: by nought") as told:
        runs.run_config(config, tmp_path / "a", callbacks=[broken])
    assert isinstance(told.value.__cause__, ZeroDivisionError)
    assert broken.end.state == "failed" and broken.end.summary is None
    assert json.loads((tmp_path / "a" / "progress.json").read_text())["state"] == "failed"
    notes = Notes()
    resuming.resume_folder(tmp_path / "a", callbacks=[notes])
    assert notes.seen[0] == ("start", 2), "the second round was finished, and is not done again"
    runs.run_config(config, tmp_path / "b")
    assert alike(tmp_path / "a", tmp_path / "b"), "callbacks change no bit"


def test_a_callback_may_end_a_run_as_ctrl_c_would(tmp_path):
    early = Raises(KeyboardInterrupt(), round=1)
    result = runs.run_config(small("fedit", "rounds=3"), tmp_path / "run", callbacks=[early])
    assert result.summary["interrupted"] and result.summary["rounds"] == 1
    assert early.end == End("interrupted", early.end.summary) and early.end.summary["rounds"] == 1


def test_faults_are_told():
    heard = []

    class Faults:
        def on_fault(self, event):
            heard.append((event.kind, event.client, event.text))

    watch = Callbacks([Faults()]).wrap(lambda event: None)
    for kind in ("turn", "absent", "quarantined", "round"):
        watch(runs.Event(kind, 0, 1, text="why"))
    assert heard == [("absent", 1, "why"), ("quarantined", 1, "why")]


@pytest.mark.parametrize(
    "one, words",
    [
        (object(), "none of the methods on_start"),
        (Notes, "the class Notes; pass an instance"),
        (type("Odd", (), {"on_rounds": lambda self, x: None})(), "did you mean 'on_round'"),
    ],
)
def test_what_is_no_callback_is_said_before_anything_runs(one, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        runs.run_config(small("fedit"), tmp_path / "run", callbacks=[one])
    assert not (tmp_path / "run").exists()


FIGURES = {
    "train/loss": 1.5, "train/clients": 2, "global/accuracy": 0.5, "global/loss": 1.2, "clients/mean": 0.6,
    "clients/examples_mean": 0.61, "clients/worst": 0.4, "clients/spread": 0.1, "clients/scored": 2,
    "attack/success": 0.25, "aggregation/served": 0.2, "aggregation/drift": 1.5, "bytes_up/adapter": 100,
    "bytes_up/head": 10, "bytes_up/total": 110, "bytes_down/total": 0, "seconds/train": 1.5, "seconds/evaluate": 0.5, "seconds/total": 2.25,
    "privacy/epsilon": 2.5, "faults/absent": 1, "faults/quarantined": 1,
}  # fmt: skip


def test_the_names_of_the_figures_are_a_promise():
    found = round_figures(RECORD)
    assert found.keys() == FIGURES.keys() and all(found[k] == pytest.approx(v) for k, v in FIGURES.items())
    assert round_figures({"round": 1, "global": {"loss": float("nan")}, "privacy": {"epsilon": None}}).keys() == {
        "train/clients", "bytes_up/total", "bytes_down/total",
    }  # fmt: skip
    assert flatten_table({"a": {"b": {"c": 1}}, "d": {}, "e": [1]}) == {"a.b.c": 1, "d": {}, "e": [1]}


def test_every_name_is_in_the_docs():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text(encoding="utf-8")
    missing = [name for name in FIGURES if f"`{name}`" not in text]
    assert not missing
    assert all(f"`{hook}`" in text for hook in callbacks.HOOKS)
