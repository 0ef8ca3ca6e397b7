"""Checkpoints that are cut off, altered, foreign or gone; what is kept; and disks that are full."""

import errno
import itertools
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load

import fedlora
from fedlora.files import decode_state, load_tree, serialize
from tests.fixtures.federation import same
from tests.fixtures.resume import alike, small, stopped

NAME = "fedex-lora"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run of four rounds, and one that was stopped after three of them."""
    folder = tmp_path_factory.mktemp("runs")
    settings = small(NAME, "rounds=4", "training.keep_optimizer=true")
    fedlora.run(settings, folder / "whole")
    stopped(settings, folder / "broken", 3)
    return folder


@pytest.fixture
def broken(runs, tmp_path):
    shutil.copytree(runs / "broken", tmp_path / "run")
    return tmp_path / "run"


def states(folder):
    return sorted((folder / "checkpoints").glob("[0-9]*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def altered(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def gone(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, emptied, altered, gone], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("what", ["[0-9]*", "private-*", "base_updates/*"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(damage, what, broken, runs):
    newest = sorted((broken / "checkpoints").glob(what))[-1]
    damage(newest)
    said = []
    result = fedlora.resume(broken, watch=said.append)
    whole = damage is gone and what == "[0-9]*"  # then it is as if it had never been
    notes = [event.text for event in said if event.kind == "note"]
    assert result.summary["resumed"] == [2]
    assert bool(notes) == (not whole)
    if not whole:
        why = "cannot be read" if damage is gone else "was cut off or altered"
        assert notes[0].startswith(newest.name) and why in notes[0]
        assert notes[0].endswith("; the checkpoint before it is used.")
        assert why in json.loads((broken / "summary.json").read_text())["refused"][0]
    assert alike(broken, runs / "whole")


def test_all_damaged_is_one_sentence(broken):
    for path in states(broken):
        cut(path)
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"holds no checkpoint to go on from: 000003-.* was cut off or altered; 000002-"
    ):
        fedlora.resume(broken)
    assert before == {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}


def test_a_foreign_one_is_refused_and_the_one_before_is_used(broken, runs, tmp_path):
    other = small(NAME, "rounds=3", "training.keep_optimizer=true", "training.learning_rate=1e-4")
    fedlora.run(other, tmp_path / "other")
    states(broken)[-1].unlink()
    for path in (tmp_path / "other" / "checkpoints").rglob("*3-*.safetensors"):
        place = broken / path.relative_to(tmp_path / "other")
        shutil.copy(path, place)
    said = []
    assert fedlora.resume(broken, watch=said.append).summary["resumed"] == [2]
    assert any("holds a run of another configuration; the checkpoint before" in event.text for event in said)
    assert alike(broken, runs / "whole")


def test_records_that_are_gone_are_said(broken):
    (broken / "metrics.jsonl").write_text((broken / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="has 1 of the 3 rounds that the checkpoint counts"):
        fedlora.resume(broken)


def test_a_record_beyond_the_checkpoint_and_one_that_was_cut_off_are_taken_back(broken, runs):
    for path in (states(broken)[-1],):
        path.unlink()
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"round": 4, "coh')
    fedlora.resume(broken)
    assert alike(broken, runs / "whole")


def test_other_first_values_are_refused(broken, monkeypatch):
    def other(content):
        tree, about = decode_state(content)
        return tree, {**about, "made": "0" * 32} if "made" in about else about

    monkeypatch.setattr("fedlora.engines.checkpoint.decode_state", other)
    with pytest.raises(ValueError, match="made with other first values of the adapters than this machine draws"):
        fedlora.resume(broken)


def numbers(folder):
    return [int(path.name[:6]) for path in states(folder)]


def test_the_last_so_many_are_kept_and_what_belongs_to_them(tmp_path):
    settings = small(
        "fedsa-lora",
        "rounds=6",
        "checkpoint.keep=2",
        "clients.count=4",
        "clients.per_round=1",
        "evaluation.measure=false",
    )
    result = fedlora.run(settings, tmp_path / "run")
    assert numbers(tmp_path / "run") == [5, 6]
    parts = sorted(int(path.name[8:14]) for path in (tmp_path / "run" / "checkpoints").glob("private-*"))
    last = {}
    for record in result.records[:5]:
        last[record["cohort"][0]] = record["round"]
    assert parts == sorted({*last.values(), 6}), (
        "each client's newest state, and the one before of whoever trained last"
    )


def test_every_so_many_rounds(tmp_path):
    fedlora.run(small("fedit", "rounds=5", "checkpoint.every=2", "checkpoint.keep=9"), tmp_path / "run")
    assert numbers(tmp_path / "run") == [2, 4, 5]


@pytest.mark.parametrize("by", ["global", "clients"])
def test_the_best_round_is_kept_and_left_as_a_folder(by, tmp_path):
    own = ["checkpoint.keep=1", f"checkpoint.best='{by}'", "checkpoint.every=4", "training.learning_rate=3e-2"]
    settings = small(NAME, "rounds=5", *own)
    result = fedlora.run(settings, tmp_path / "run")
    values = [r["global"]["accuracy"] if by == "global" else r["clients"]["mean"] for r in result.records]
    best = values.index(max(values)) + 1
    assert result.summary["best"] == {"round": best, "by": by, "value": max(values)}
    assert numbers(tmp_path / "run") == sorted({best, 5})
    fedlora.run(small(NAME, f"rounds={best}", *own), tmp_path / "short")
    for file in ("shared", "base_update"):
        theirs, ours = (
            load_tree(place / f"{file}.safetensors") for place in (tmp_path / "short", tmp_path / "run/best")
        )
        assert same(theirs, ours)
    summary = json.loads((tmp_path / "run" / "best" / "summary.json").read_text())
    assert summary["rounds"] == best and summary["final"]["global"] == result.records[best - 1]["global"]


def test_the_best_is_still_the_best_after_a_break(tmp_path):
    own = ["rounds=5", "checkpoint.keep=1", "checkpoint.best='global'", "training.learning_rate=3e-2"]
    whole = fedlora.run(small("fedit", *own), tmp_path / "whole")
    for after in (1, 4):
        stopped(small("fedit", *own), tmp_path / f"run{after}", after)
        again = fedlora.resume(tmp_path / f"run{after}")
        assert again.summary["best"] == whole.summary["best"]
        assert alike(tmp_path / f"run{after}", tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "setting", "sentence"),
    [
        ("fedit", "checkpoint.keep=0", "checkpoint.keep is 0; it must be at least 1"),
        ("fedit", "checkpoint.every=0", "checkpoint.every is 0; it must be at least 1"),
        ("fedsa-lora", "checkpoint.best='global'", "has no global model; set it to 'clients'"),
        ("fedit", "checkpoint.best='worst'", "checkpoint.best is 'worst'; it should be"),
    ],
)
def test_settings_that_cannot_be(name, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(name, setting)


@pytest.mark.parametrize("call", [1, 9, 14, 20, 25])
def test_a_disk_that_is_full_at_any_write_loses_nothing(call, tmp_path, runs, monkeypatch):
    settings = small(NAME, "rounds=4", "training.keep_optimizer=true")
    real, left = os.fsync, [call]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"^the disk is full: .* keeps every round that was finished; free some space"
    ) as e:
        fedlora.run(settings, tmp_path / "run")
    assert str(e.value).count(".") >= 1 and e.value.errno is None
    with pytest.raises(OSError, match="the disk is full"):
        fedlora.resume(tmp_path / "run") if (tmp_path / "run" / "config.toml").exists() else fedlora.run(
            settings, tmp_path / "run"
        )
    monkeypatch.undo()
    if (tmp_path / "run" / "config.toml").exists():
        fedlora.resume(tmp_path / "run")
    else:
        fedlora.run(settings, tmp_path / "run")
    assert alike(tmp_path / "run", runs / "whole")


def test_a_real_limit_on_the_size_of_files(tmp_path, runs):
    """The kernel refuses to write beyond the limit, in the middle of a file."""
    settings = small(NAME, "rounds=4", "training.keep_optimizer=true")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(OSError, match="the disk is full"):
            fedlora.run(settings, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not states(tmp_path / "run") and not list((tmp_path / "run").rglob(".*"))
    fedlora.resume(tmp_path / "run")
    assert alike(tmp_path / "run", runs / "whole")


def test_the_bytes_of_a_file_follow_from_its_content():
    """Safetensors orders the notes in a header by chance, another way in each call."""
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16)}
    notes = {name: str(i) for i, name in enumerate(("format", "zeta", "alpha", "é"))}
    found = {serialize(tensors, dict(some)) for some in itertools.permutations(notes.items())}
    (data,) = found
    assert all(torch.equal(x, tensors[name]) for name, x in load(data).items())
    assert safetensors_notes(data) == notes and int.from_bytes(data[:8], "little") % 8 == 0


def safetensors_notes(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
