"""Each tracker with its real local backend: what it kept is read back, after a run that was broken off and went on."""

import json
import sys
from dataclasses import replace

import pytest

from fedlora.engines.clients import DROPPED
from fedlora.files import save_json
from fedlora.runs import resume as resuming
from fedlora.runs import run as runs
from fedlora.runs import trackers
from fedlora.runs.callbacks import End, Start
from fedlora.runs.config import build, read
from fedlora.runs.record import round_figures
from fedlora.runs.trackers import _callback as tracking
from fedlora.schema import ConfigError
from tests.fixtures import trackers as reading
from tests.fixtures.resume import small

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the trackers' own packages
    pytest.mark.xdist_group("trackers"),  # which take seconds to import, and are all in one run
]

EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}


DROPS = "clients.dropout=0.4"  # so that there is somebody to miss, before the break and after it


class Stops:
    def on_round(self, record):
        if record["round"] == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two rounds, broken off, and a third: with all four trackers, of which one came only then."""
    place = tmp_path_factory.mktemp("tracked")
    some = ["track.tensorboard=true", f"track.mlflow={{uri='sqlite:///{place}/mlflow.db',experiment='hospitals'}}",
            "track.wandb={mode='offline'}"]  # fmt: skip
    folder = place / "one"
    runs.run_config(small("fedit", "rounds=3", DROPS, *some), folder, callbacks=[Stops()])
    kept = json.loads((folder / "trackers.json").read_text())
    result = resuming.resume_folder(folder, overrides=["track.trackio={project='late'}"])
    return place, folder, result, kept


def expected(result):
    found = {}
    for record in result.records:
        for name, value in round_figures(record).items():
            found.setdefault(name, {})[record["round"]] = value
    return found


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name  # TensorBoard keeps float32
    return True


def test_tensorboard(done):
    _, folder, result, _ = done
    assert len(list((folder / "tensorboard").glob("events.*"))) == 2, "one file a process"
    assert close(reading.tensorboard(folder / "tensorboard"), expected(result))


def test_mlflow(done):
    place, _, result, _ = done
    found, settings, status = reading.mlflow(f"sqlite:///{place}/mlflow.db", "hospitals")
    assert close(found, expected(result))
    assert settings["method.name"] == "fedit" and settings["rounds"] == "3" and status == "FINISHED"


def test_wandb(done):
    _, folder, result, kept = done
    found, ids = reading.wandb(folder)
    assert close(found, expected(result))
    assert ids == {kept["wandb"]["run"]}, "two files of one run"


def test_trackio_has_the_rounds_before_it_came(done):
    _, _, result, kept = done
    assert "trackio" not in kept
    found, run = reading.trackio("late")
    assert close(found, expected(result)) and run == "one"


def test_the_config_keeps_them_and_no_bit_goes_by_them(done, tmp_path):
    _, folder, result, _ = done
    track = read(folder / "config.toml").table["track"]
    assert list(track) == ["tensorboard", "mlflow", "wandb", "trackio"] and track["trackio"] == {"project": "late"}
    plain = runs.run_config(small("fedit", "rounds=3", DROPS))
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in plain.records] == [
        {k: v for k, v in r.items() if k != "seconds"}
        for r in json.loads(json.dumps(result.records), object_hook=whole)
    ]
    assert "track" not in small("fedit").table, "a config without trackers is as it was"


def whole(table):
    return {int(k) if k.isdigit() else k: v for k, v in table.items()}


def test_each_tracker_has_the_names_of_who_was_missing(done):
    place, folder, result, _ = done
    absent = result.summary["absent"]
    rounds = {number for one in absent.values() for number in one}
    assert rounds & {"1", "2"} and "3" in rounds, "before the break and after it"
    said = [f"client {client}, absent in round {', '.join(own)}: {DROPPED}" for client, own in absent.items()]
    texts = {
        "tensorboard": reading.tensorboard_text(folder / "tensorboard"),
        "mlflow": reading.mlflow_tag(f"sqlite:///{place}/mlflow.db", "hospitals"),
        "wandb": reading.wandb_summary(folder),
        "trackio": reading.trackio_text("late"),
    }
    for name, text in texts.items():
        assert [line.strip() for line in text.splitlines()] == said, name


def test_who_missed_nobody_sends_no_text_and_means_over_fewer_are_in_it(tmp_path, monkeypatch):
    session = Flaky([])
    monkeypatch.setattr(trackers.TRACKERS.load("tensorboard"), "open", lambda self, told: session)
    start = Start(small("fedit", "track.tensorboard=true"), None, [], print)
    clients = {"each": [0.5, 0.5, 0.5]}
    for records, text in (
        ([{"round": 1, "clients": clients}], None),
        ([{"round": 1, "clients": clients}, {"round": 2, "quarantined": {"0": "nan"}},
          {"round": 3, "unscored": {"2": "late"}, "clients": {"each": [0.5, 0.5, None]}}],
         "mean over 2 of 3 clients in round 3\nclient 2, not scored in round 3: late\n"
         "client 0, quarantined in round 2: nan"),
    ):  # fmt: skip
        one = tracking.Tracking(start.config.track.trackers)
        one.on_start(start)
        for record in records:
            one.on_round(record)
        one.on_end(End("finished", {}))
        assert session.said == text


class Flaky(trackers.TrackerSession):
    run = "flaky"

    def __init__(self, fails):
        self.fails, self.got, self.state, self.said = fails, [], None, None

    def log(self, number, values):
        if number in self.fails:
            self.fails.remove(number)
            raise ConnectionError("no\nroute")
        self.got.append(number)

    def describe(self, number, text):
        self.said = text

    def close(self, state):
        self.state = state


def test_a_round_that_a_tracker_does_not_take_is_sent_again_and_said_once(tmp_path, monkeypatch):
    session, said = Flaky([1, 1, 3]), []
    monkeypatch.setattr(trackers.TRACKERS.load("tensorboard"), "open", lambda self, told: session)
    watch = lambda event: said.append(event.text) if event.kind == "note" else None  # noqa: E731
    runs.run_config(small("fedit", "rounds=3", "track.tensorboard=true"), tmp_path / "run", watch)
    assert session.got == [1, 2, 3] and session.state == "finished", "the third was sent at the end"
    assert said == [
        "tensorboard does not take round 1, it is tried again: no route",
        "tensorboard does not take round 3, it is tried again: no route",
    ]


def test_what_a_tracker_never_took_is_named(tmp_path, monkeypatch):
    session, said = Flaky([2] * 9), []
    monkeypatch.setattr(trackers.TRACKERS.load("tensorboard"), "open", lambda self, told: session)
    watch = lambda event: said.append(event.text) if event.kind == "note" else None  # noqa: E731
    runs.run_config(small("fedit", "rounds=2", "track.tensorboard=true"), tmp_path / "run", watch)
    assert said[-1] == "tensorboard lacks the rounds 2; metrics.jsonl has them."
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["tensorboard"]["rounds"] == 1


def test_a_tracker_that_cannot_begin_is_said_before_the_first_round(tmp_path):
    (tmp_path / "file").write_text("")
    config = small("fedit", "rounds=1", f"track.tensorboard={{folder='{tmp_path}/file'}}")
    with pytest.raises(ConfigError, match=r"tensorboard did not begin: .*; mend track\.tensorboard, or leave it out"):
        runs.run_config(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_is_one_sentence_with_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fedlora.runs.trackers._base.find_spec", lambda package: None if package == EXTRAS[name] else object()
    )
    config = small("fedit", f"track.{name}=true")
    with pytest.raises(ConfigError) as told:
        runs.run_config(config, tmp_path / "run")
    assert str(told.value) == (
        f"[track] names {name!r}, but {EXTRAS[name]} is not installed; run `pip install 'fedlora[track-{name}]'`, or "
        f"leave track.{name} out."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "track, words",
    [
        ({"tensorbord": True}, "did you mean 'tensorboard'"),
        ({"mlflow": "yes"}, "track.mlflow is 'yes'; it should be true, false or a table"),
        ({"mlflow": {"url": "x"}}, "did you mean 'track.mlflow.uri'|did you mean 'uri'"),
        ({"mlflow": {"uri": "https://me:secret@host"}}, "holds a password"),
        ({"wandb": {"mode": "dryrun"}}, "'online' or 'offline'"),
    ],
)
def test_wrong_settings(track, words):
    table = {k: v for k, v in small("fedit").table.items() if k != "track"}
    with pytest.raises(ConfigError, match=words):
        build({**table, "track": track})


def test_reading_a_config_imports_no_tracker():
    import subprocess

    code = (
        "import sys; from fedlora.runs import trackers; t = trackers.Track.from_table({name: True for name in trackers.TRACKERS.names()});"
        "print([m for m in ('tensorboard', 'mlflow', 'wandb', 'trackio') if m in sys.modules], sorted(t.trackers))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "[] ['mlflow', 'tensorboard', 'trackio', 'wandb']\n"


def test_other_settings_begin_another_run_with_all_rounds(tmp_path):
    config = small("fedit", "rounds=1", "track.tensorboard=true")
    runs.run_config(config, tmp_path / "run")
    own = tmp_path / "boards"
    runs.run_config(replace(config, rounds=2, track=trackers.Track.from_table({"tensorboard": {"folder": str(own)}})), tmp_path / "run",
             again=True)  # fmt: skip
    assert sorted(reading.tensorboard(own / "run")["clients/mean"]) == [1, 2]


def test_a_broken_file_of_trackers_is_said(tmp_path):
    save_json(tmp_path / "trackers.json", {})
    (tmp_path / "trackers.json").write_text("{")
    from fedlora.runs.trackers._callback import _read_state

    with pytest.raises(ConfigError, match=r"trackers\.json.* is no JSON"):
        _read_state(tmp_path)
