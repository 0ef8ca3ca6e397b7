"""A run that was stopped between any two rounds goes on with the bits of one that never was."""

import json

import pytest
import torch

import fedlora
from fedlora import methods
from fedlora.config import ConfigError
from fedlora.state import load_tree
from tests.fixtures.federation import same
from tests.resume.world import alike, small

ROUNDS = 4


def stopped(settings, folder, after):
    """A run that was asked for more rounds than it came to."""

    def watch(event):
        if event.kind == "turn" and event.round == after:
            raise KeyboardInterrupt

    return fedlora.run(settings, folder, watch)


@pytest.mark.parametrize("name", methods.names())
def test_every_method(name, tmp_path):
    settings = small(name, f"rounds={ROUNDS}")
    fedlora.run(settings, tmp_path / "whole")
    assert stopped(settings, tmp_path / "run", 2).summary["rounds"] == 2
    result = fedlora.resume(tmp_path / "run")
    assert result.summary["rounds"] == ROUNDS and result.summary["resumed"] == [2]
    assert not result.summary["interrupted"]
    assert alike(tmp_path / "run", tmp_path / "whole")


SETTINGS = {
    "moments": ["training.keep_optimizer=true"],
    "momentum": ["training.keep_optimizer=true", "training.optimizer=sgd", "clients.per_round=2"],
    "server": ["server.optimizer=adam"],
    "yogi": ["server.optimizer=yogi", "clients.per_round=1"],
    "cohort": ["clients.count=4", "clients.per_round=2", "clients.dropout=0.3"],
    "schedule": ["training.schedule=cosine", "training.warmup=0.3"],
    "unequal": ["clients.capability=uniform", "clients.stragglers=0.5"],
    "seldom": ["evaluation.every=3", "checkpoint.every=3"],
    "spilled": ["engine.spill=true", "evaluation.measure=false"],
    "copied": ["attack={name='copy', clients=[1], victim=0}", "hygiene.strikes=0"],
    "halved": ["training.precision=bf16"],
}


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting, after, tmp_path):
    name = {"cohort": "fedex-lora", "unequal": "hetlora"}.get(setting, "fedit")
    settings = small(name, f"rounds={ROUNDS}", *SETTINGS[setting])
    fedlora.run(settings, tmp_path / "whole")
    stopped(settings, tmp_path / "run", after)
    fedlora.resume(tmp_path / "run")
    assert alike(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "fedsa-lora"])
def test_twice_and_clients_that_are_seldom_there(name, tmp_path):
    own = ["clients.count=5", "clients.per_round=2", "training.keep_optimizer=true", "rounds=7"]
    settings = small(name, *own)
    fedlora.run(settings, tmp_path / "whole")
    stopped(settings, tmp_path / "run", 2)
    with_break = small(name, *own)
    assert with_break.rounds == 7
    fedlora.resume(tmp_path / "run", watch=lambda event: breaking(event, 5))
    result = fedlora.resume(tmp_path / "run")
    assert result.summary["resumed"] == [2, 5]
    assert alike(tmp_path / "run", tmp_path / "whole")


def breaking(event, after):
    if event.kind == "step" and event.round == after:
        raise KeyboardInterrupt


def test_a_finished_run_is_made_longer(tmp_path):
    fedlora.run(small("fedex-lora", "rounds=3"), tmp_path / "whole")
    fedlora.run(small("fedex-lora", "rounds=2"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a finished run of 2 rounds; `fedlora resume .*--rounds 4` would"):
        fedlora.resume(tmp_path / "run")
    result = fedlora.resume(tmp_path / "run", rounds=3)
    assert result.summary["rounds"] == result.summary["rounds_asked"] == 3
    assert alike(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(ConfigError, match="holds 3 rounds already; name more than these"):
        fedlora.resume(tmp_path / "run", rounds=2)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]["whole"] > 0


def test_a_run_without_a_finished_round_begins_anew(tmp_path):
    settings = small("fedit", "rounds=2")
    fedlora.run(settings, tmp_path / "whole")
    stopped(settings, tmp_path / "run", 0)
    result = fedlora.resume(tmp_path / "run")
    assert "resumed" not in result.summary
    assert alike(tmp_path / "run", tmp_path / "whole")


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
def test_what_would_change_the_bits_is_refused(overrides, rounds, sentence, tmp_path):
    stopped(small("fedit", "rounds=4"), tmp_path / "run", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=sentence):
        fedlora.resume(tmp_path / "run", rounds, overrides)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_what_leaves_the_bits_alone_may_change(tmp_path):
    settings = small("fedit", "rounds=3")
    fedlora.run(settings, tmp_path / "whole")
    stopped(settings, tmp_path / "run", 1)
    fedlora.resume(tmp_path / "run", overrides=["checkpoint.keep=1", "engine.allocator=return"])
    assert alike(tmp_path / "run", tmp_path / "whole")
    assert len(list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))) == 1


def test_run_names_resume_and_other_folders_are_refused(tmp_path):
    fedlora.run(small("fedit", "rounds=1"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run already; `fedlora resume .*run` goes on with it"):
        fedlora.run(small("fedit", "rounds=1"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds no run: it has no config.toml"):
        fedlora.resume(tmp_path)
    (tmp_path / "run" / "run.json").write_text('{"run": "abc"}')
    with pytest.raises(ConfigError, match="keep their state on their own machines; go on with it by `flwr run`"):
        fedlora.resume(tmp_path / "run")


def test_a_users_file_holds_plain_leaves_and_the_checkpoint_the_notes(tmp_path):
    settings = small("fedit", f"rounds={ROUNDS}", "transport={down='int4', error_feedback=true}")
    result = fedlora.run(settings, tmp_path / "whole")
    assert any(leaf.startswith("_owed.") for layer in result.shared.values() for leaf in layer), "there are notes"
    left = load_tree(tmp_path / "whole" / "shared.safetensors")
    assert left and not [leaf for layer in left.values() for leaf in layer if leaf.startswith("_")]
    assert all(torch.equal(x, result.shared[part][leaf]) for part, layer in left.items() for leaf, x in layer.items())
    stopped(settings, tmp_path / "run", 2)
    assert same(fedlora.resume(tmp_path / "run").shared, result.shared), "what is owed goes on from the checkpoint"
