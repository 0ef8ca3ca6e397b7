"""The strategy beside hostile nodes: validation names and leaves them out, a robust rule outvotes them."""

import logging

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the flower extra")
pytest.importorskip("peft", reason="needs the peft extra")

from flwr.app import Array

from fedlora.flower import FedLoRA
from fedlora.security.validation import Validation
from tests.fixtures.flower_strategy import Federation, gap, mean, spoiled, strategy

FIVE = {node: {"partition-id": node % 3} for node in (2, 3, 4, 5, 6)}


def factor(by, leaf="lora_B"):
    """Every factor of one side, times a number; the other one is left."""

    def change(message):
        arrays = message.content["arrays"]
        for key in [key for key in arrays if leaf in key]:
            arrays[key] = Array((by * arrays[key].numpy()).astype(np.float32))

    return change


@pytest.mark.parametrize("method", ["fedit", "fedex-lora"])
def test_an_absurd_upload_is_quarantined_and_the_rest_go_on(monkeypatch, caplog, method):
    world = Federation(monkeypatch, FIVE, post=spoiled(3, factor(1e3)))
    made = strategy(method, fraction_evaluate=0.0, validation={})
    with caplog.at_level(logging.WARNING, "flwr"):
        world.run(made)
    assert list(made.quarantine) == [1] and list(made.quarantine[1]) == [3]
    assert "above validation.norm_limit" in made.quarantine[1][3]
    assert "node 3 is left out, its upload is quarantined: its update's norm is" in caplog.text
    clean = Federation(monkeypatch, {node: about for node, about in FIVE.items() if node != 3})
    clean.run(strategy(method, fraction_evaluate=0.0))
    assert gap(world.served[1], clean.served[1]) <= 1e-6, "as if it had not been there"


def test_a_node_that_does_so_again_and_again_is_not_asked_any_more(monkeypatch, caplog):
    world = Federation(monkeypatch, FIVE, post=spoiled(3, factor(1e3)))
    made = strategy("fedit", fraction_evaluate=0.0, validation={"strikes": 1})
    with caplog.at_level(logging.WARNING, "flwr"):
        world.run(made, rounds=2)
    assert "round 2: node 3 is left out: it was quarantined in 1 rounds" in caplog.text
    asked = [m.metadata.dst_node_id for m in world.sent_down()]
    assert asked.count(3) == 1
    world.run(made)
    assert list(made.quarantine) == [1], "another run begins anew"


def test_a_robust_rule_outvotes_what_hygiene_lets_in(monkeypatch):
    flipped = spoiled(3, factor(-3.0))
    ends = {}
    for robust in (None, "krum", {"name": "multi-krum", "attackers": 0.2}):
        world = Federation(monkeypatch, FIVE, post=flipped)
        made = strategy("fedit", fraction_evaluate=0.0, robust=robust)
        world.run(made)
        assert made.quarantine == {}
        ends[str(robust)] = world.served[1]
    honest = Federation(monkeypatch, {node: about for node, about in FIVE.items() if node != 3})
    honest.run(strategy("fedit", fraction_evaluate=0.0))
    several = next(end for name, end in ends.items() if "multi" in name)
    assert gap(several, honest.served[1]) <= 1e-6 < gap(ends["None"], honest.served[1])
    turn = next(after for rows, _, after in world.trained)
    assert ends["krum"].keys() == mean([turn], [1]).keys()


def test_a_rule_without_three_replies_changes_nothing(monkeypatch, caplog):
    world = Federation(monkeypatch, {node: FIVE[node] for node in (2, 3)})
    with caplog.at_level(logging.WARNING, "flwr"):
        world.run(strategy("fedit", fraction_evaluate=0.0, robust="krum"))
    assert gap(world.served[0], world.served[1]) == 0 and "a robust rule needs 3 good uploads" in caplog.text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"robust": "krumm"}, "did you mean 'krum'"),
        ({"robust": {"attackers": 0.2}}, "robust names no rule"),
        ({"robust": {"name": "krum", "attackers": 0.5}}, "robust.attackers is 0.5"),
        ({"validation": {"norm_limit": 0.5}}, "validation.norm_limit is 0.5"),
        ({"validation": {"keep_files": 3}}, "there is no setting 'validation.keep_files'"),
        ({"method": "hetlora", "robust": "clip"}, "gives weights of its own"),
    ],
)
def test_settings_that_do_not_fit_are_said_at_once(settings, words):
    with pytest.raises(ValueError, match=".") as error:
        FedLoRA(**{"method": "fedit", "lora_alpha": 8, **settings})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_app_may_be_fractions():
    assert Validation().cap_examples([0.001, 0.002, 0.003, 9.0]) == [0.001, 0.002, 0.003, pytest.approx(0.25)]
    assert Validation().cap_examples([1, 2, 10**12]) == [1, 2, 200]
