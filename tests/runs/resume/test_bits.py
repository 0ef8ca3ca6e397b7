"""A run that was stopped between any two rounds goes on with the bits of one that never was."""

import json
import shutil

import pytest
import torch

import fedlora
from fedlora.files import load_tree
from fedlora.methods import METHODS
from fedlora.schema import ConfigError
from tests.fixtures.federation import same
from tests.fixtures.resume import alike, breaking, like_reference, small, stopped

ROUNDS = 4


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method(name, tmp_path, reference):
    """Also: the same configuration has the same bits, files, figures and crossings again."""
    assert stopped(like_reference(name), tmp_path / "run", 2).summary["rounds"] == 2
    result = fedlora.resume(tmp_path / "run")
    assert result.summary["rounds"] == ROUNDS and result.summary["resumed"] == [2]
    assert not result.summary["interrupted"]
    assert alike(tmp_path / "run", reference(name).folder)


SETTINGS = {  # what a run has to know again: a method, and settings that have to do with different things
    "moments, the server's, and a schedule": (
        "fedit", "training.keep_optimizer=true", "server.optimizer=adam", "training.schedule=cosine", "training.warmup=0.3",
    ),
    "momentum and who was there": (
        "fedit", "training.keep_optimizer=true", "training.optimizer=sgd", "training.precision=bf16", "clients.per_round=2",
    ),
    "yogi and one client a round": ("fedit", "server.optimizer=yogi", "clients.per_round=1"),
    "cohorts, base updates, and checkpoints that are seldom": (
        "fedex-lora", "clients.count=4", "clients.per_round=2", "clients.dropout=0.3", "evaluation.every=3",
        "checkpoint.every=3",
    ),
    "unequal clients, and uploads on disk": (
        "hetlora", "clients.capability=uniform", "clients.stragglers=0.5", "engine.offload=true", "evaluation.measure=false",
    ),
    "what a copying client overheard": ("fedit", "attack={name='copy', clients=[1], victim=0}", "validation.strikes=0"),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_settings(what, tmp_path):
    """Stopped after the first round and after the third."""
    name, *settings = SETTINGS[what]
    made = small(name, f"rounds={ROUNDS}", *settings)
    fedlora.run(made, tmp_path / "whole")
    assert stopped(made, tmp_path / "run", 1).summary["rounds"] == 1
    fedlora.resume(tmp_path / "run", watch=lambda event: breaking(event, 3, "turn"))
    assert fedlora.resume(tmp_path / "run").summary["resumed"] == [1, 3]
    assert alike(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "fedsa-lora"])
def test_twice_and_clients_that_are_seldom_there(name, tmp_path):
    settings = small(name, "clients.count=5", "clients.per_round=2", "training.keep_optimizer=true", "rounds=7")
    fedlora.run(settings, tmp_path / "whole")
    stopped(settings, tmp_path / "run", 2)
    fedlora.resume(tmp_path / "run", watch=lambda event: breaking(event, 5))
    result = fedlora.resume(tmp_path / "run")
    assert result.summary["resumed"] == [2, 5]
    assert alike(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_made_longer(tmp_path, reference):
    fedlora.run(like_reference("fedex-lora", "rounds=2"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a finished run of 2 rounds; `fedlora resume .*--rounds 4` would"):
        fedlora.resume(tmp_path / "run")
    result = fedlora.resume(tmp_path / "run", rounds=ROUNDS)
    assert result.summary["rounds"] == result.summary["rounds_asked"] == ROUNDS
    assert alike(tmp_path / "run", reference("fedex-lora").folder)
    with pytest.raises(ConfigError, match="holds 4 rounds already; name more than these"):
        fedlora.resume(tmp_path / "run", rounds=2)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]["whole"] > 0


def test_a_run_without_a_finished_round_begins_anew(tmp_path, reference):
    stopped(like_reference("fedit"), tmp_path / "run", 0)
    result = fedlora.resume(tmp_path / "run")
    assert "resumed" not in result.summary
    assert alike(tmp_path / "run", reference("fedit").folder)


@pytest.mark.parametrize(
    ("overrides", "rounds", "sentence"),
    [
        (
            ["training.learning_rate=1e-4"],
            None,
            "holds a run of another configuration; go on with the one it began with",
        ),
        (["training.schedule=linear"], 9, "training.schedule = 'linear' with warmup = 0.0 is over all 4 rounds"),
        (["engine.nam=x"], None, "there is no setting 'engine.nam'"),
    ],
)
def test_what_would_change_the_bits_is_refused(overrides, rounds, sentence, broken_off):
    before = {path: path.read_bytes() for path in broken_off.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=sentence):
        fedlora.resume(broken_off, rounds, overrides)
    assert before == {path: path.read_bytes() for path in broken_off.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def after_one(tmp_path_factory):
    """The reference run of FedIT, broken off after its first round."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    stopped(like_reference("fedit"), folder, 1)
    return folder


@pytest.fixture
def broken_off(after_one, tmp_path):
    return shutil.copytree(after_one, tmp_path / "run")


def test_what_leaves_the_bits_alone_may_change(broken_off, reference):
    fedlora.resume(broken_off, overrides=["checkpoint.keep=1", "engine.allocator=return"])
    assert alike(broken_off, reference("fedit").folder)
    assert len(list((broken_off / "checkpoints").glob("[0-9]*"))) == 1


def test_run_names_resume_and_other_folders_are_refused(tmp_path, broken_off):
    with pytest.raises(ConfigError, match=r"holds a run already; `fedlora resume .*run` goes on with it"):
        fedlora.run(small("fedit", "rounds=1"), broken_off)
    with pytest.raises(ConfigError, match=r"holds no run: it has no config.toml"):
        fedlora.resume(tmp_path)
    (broken_off / "run.json").write_text('{"run": "abc"}')
    with pytest.raises(ConfigError, match="keep their state on their own machines; go on with it by `flwr run`"):
        fedlora.resume(broken_off)


def test_a_users_file_holds_plain_leaves_and_the_checkpoint_the_notes(tmp_path):
    settings = small("fedit", f"rounds={ROUNDS}", "compression={down='int4', error_feedback=true}")
    result = fedlora.run(settings, tmp_path / "whole")
    assert any(leaf.startswith("_residual.") for layer in result.shared.values() for leaf in layer), "there are notes"
    left = load_tree(tmp_path / "whole" / "shared.safetensors")
    assert left and not [leaf for layer in left.values() for leaf in layer if leaf.startswith("_")]
    assert all(torch.equal(x, result.shared[part][leaf]) for part, layer in left.items() for leaf, x in layer.items())
    stopped(settings, tmp_path / "run", 2)
    assert same(fedlora.resume(tmp_path / "run").shared, result.shared), "what is owed goes on from the checkpoint"
