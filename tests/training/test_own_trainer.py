"""A turn with the caller's own trainer: its loss, its seeds, and training that did more or less than the method allows."""

import math
import random
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from fedlora.adapters import LoRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.ffa_lora import FFALoRA
from fedlora.training.model import Model
from fedlora.training.own_trainer import OwnTrainer, check_turn, read_end, read_loss, set_seeds
from fedlora.types import Turn
from tests.fixtures.federation import same
from tests.fixtures.own_models import Mixer

TURN = Turn(round=2, client=5, rank=2, seed=11)
WHERE = "channels.0"
BOTH = {WHERE: frozenset("AB"), "out": frozenset({"weight", "bias"})}
HALF = {WHERE: frozenset("B"), "out": frozenset({"weight", "bias"})}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model.attach(Mixer(), LoRA(2), [WHERE], head=["out"])


def rules(model, method):
    return model.rules(method, lambda dense: FedIT(dense))


def add(tree, path, leaf, value=1.0):
    return {**tree, path: {**tree[path], leaf: tree[path][leaf] + value}}


class Adding:
    """A trainer that adds to some parameters of the network, and returns a result."""

    def __init__(self, model, result=None, **changes):
        self.model, self.result, self.changes = model.network, result, changes

    def train(self):
        self.was_training = self.model.training
        with torch.no_grad():
            for name, x in self.model.named_parameters():
                x.add_(next((v for end, v in self.changes.items() if name.endswith(end)), 0.0))
        return self.result


# ------------------------------------------------------------------------------------------------------ losses
@pytest.mark.parametrize(
    ("result", "loss"),
    [
        (0.5, 0.5), (3, 3.0), (numpy.float32(0.25), 0.25), (torch.tensor(0.5), 0.5),
        (torch.tensor([[2.0]], requires_grad=True), 2.0), ({"train_loss": 0.5, "loss": 9.0}, 0.5), ({"loss": torch.tensor(1.5)}, 1.5),
        (SimpleNamespace(training_loss=0.75, loss=9.0), 0.75), (SimpleNamespace(loss=None, train_loss=2), 2.0),
        (None, None), (True, None), ("0.5", None), (torch.ones(2), None), ({}, None), ({"loss": "low"}, None),
    ],
)  # fmt: skip
def test_the_loss_in_what_train_returns(result, loss):
    assert read_loss(result) == loss
    assert type(read_loss(result)) in (float, type(None))


# ------------------------------------------------------------------------------------------------------- seeds
def draw():
    return random.random(), float(numpy.random.random()), float(torch.rand(()))


def test_all_generators_follow_from_the_seed_and_go_on_afterwards_as_before():
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    with set_seeds(7):
        first = draw()
    with pytest.raises(KeyError), set_seeds(7):
        assert draw() == first
        raise KeyError
    with set_seeds(8):
        assert not set(first) & set(draw())
    assert draw() == expected
    with set_seeds(2**63 - 1):  # numpy takes 32 bits
        draw()


# ----------------------------------------------------------------------------------- what training may change
def test_a_leaf_that_the_method_freezes_must_be_where_it_was(model):
    start, ffa = model.initial(0), rules(model, FFALoRA(LoRA(2)))
    model.load(start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_turn(model, start, add(start, WHERE, "B"), HALF, ffa, TURN)
        check_turn(model, start, add(start, WHERE, "A"), BOTH, rules(model, FedIT(LoRA(2))), TURN)
    moved = add(add(start, WHERE, "B"), WHERE, "A", 1e-6)
    with pytest.raises(
        ValueError, match=rf"A of '{WHERE}' is not where client 5's turn began, though FFA-LoRA freezes"
    ):
        check_turn(model, start, moved, HALF, ffa, TURN)


def test_a_turn_without_effect_is_a_warning(model):
    start, fedit = model.initial(0), rules(model, FedIT(LoRA(2)))
    model.load(start)
    with pytest.warns(UserWarning, match=r"client 5's training changed no adapter in round 3; its optimizer may hold"):
        check_turn(model, start, start, BOTH, fedit, TURN)
    with pytest.warns(UserWarning, match="changed no adapter"):  # of the head alone
        check_turn(model, start, add(start, "out", "bias"), BOTH, fedit, TURN)
    only_head = {WHERE: frozenset(), "out": BOTH["out"]}
    with pytest.warns(UserWarning, match="changed nothing"):
        check_turn(model, start, start, only_head, fedit, TURN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_turn(model, start, add(start, "out", "bias"), only_head, fedit, TURN)


def test_the_precision_of_a_parameter_is_no_change(model):
    """A frozen factor in bfloat16 is the start's, rounded."""
    start = model.initial(0)
    model.load(start)
    part = model.parts[WHERE]
    part.leaves["A"].data = part.leaves["A"].data.bfloat16()
    end = add(model.read(), WHERE, "B")
    assert not torch.equal(end[WHERE]["A"], start[WHERE]["A"])
    check_turn(model, start, end, HALF, rules(model, FFALoRA(LoRA(2))), TURN)


# ----------------------------------------------------------------------------------------- the end of the turn
def test_the_end_is_read_or_refused(model):
    start = model.initial(0)
    model.load(start)
    Adding(model, lora_B=1.0, B=1.0).train()
    end = read_end(model, start, BOTH, 0.5, TURN)
    assert same(end, add(start, WHERE, "B"))
    for loss in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match=rf"client 5's loss is {loss} in round 3; lower its learning rate"):
            read_end(model, start, BOTH, loss, TURN)
    with torch.no_grad():
        model.parts[WHERE].leaves["B"][0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="client 5's weights are no longer finite in round 3"):
        read_end(model, start, BOTH, None, TURN)
    read_end(model, start, {WHERE: frozenset("A")}, None, TURN)  # the others are not the client's
    model.parts[WHERE].leaves["B"].data = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=rf"B of '{WHERE}' was a parameter of shape \(16, 2\), and is a Parameter"):
        read_end(model, start, BOTH, None, TURN)


# ------------------------------------------------------------------------------------------------- whole turns
def test_a_turn(model):
    start = model.initial(0)
    trainer = Adding(model, result={"loss": 0.25}, B=0.5, A=0.0)
    model.network.eval()
    turn = OwnTrainer(model, trainer, TURN, 4)
    end = turn.fit(start, HALF, rules(model, FFALoRA(LoRA(2))))
    assert turn.loss == 0.25 and trainer.was_training
    assert same(end, add(start, WHERE, "B", 0.5))
    assert end[WHERE]["A"] is start[WHERE]["A"], "frozen leaves are the same objects"
    assert [n for n, x in model.network.named_parameters() if x.requires_grad] and not model.parts[WHERE].leaves["A"].requires_grad  # fmt: skip


def test_a_turn_that_trains_nothing_does_not_call_the_trainer(model):
    start = model.initial(0)
    nothing = dict.fromkeys(start, frozenset())
    turn = OwnTrainer(model, SimpleNamespace(train=lambda: pytest.fail("called")), TURN, 4)
    assert turn.fit(start, nothing, rules(model, FedIT(LoRA(2)))) is start and turn.loss is None


def test_a_turn_that_changes_the_base_is_refused(model):
    trainer = Adding(model, **{"norm.weight": 0.1, "B": 1.0})
    with pytest.raises(ValueError, match="training changed 'norm.weight', which belongs to the base"):
        OwnTrainer(model, trainer, TURN, 4).fit(model.initial(0), BOTH, rules(model, FedIT(LoRA(2))))


def test_the_draws_of_a_turn_are_those_of_its_seed(model):
    class Drawing(Adding):
        def train(self):
            nn.init.normal_(next(x for n, x in self.model.named_parameters() if n.endswith("B")))

    start = model.initial(0)
    ends = [
        OwnTrainer(model, Drawing(model), replace(TURN, seed=seed), 4).fit(start, HALF, rules(model, FFALoRA(LoRA(2))))
        for seed in (3, 3, 4)
    ]
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_a_gradient_before_training_is_refused(model):
    with pytest.raises(ValueError, match='such as method.score = "random"'):
        OwnTrainer(model, None, TURN, 4).gradient(model.initial(0))
