"""Server optimisers against torch's SGD and the formulas of the paper, on top of any method that averages."""

import pytest
import torch

import fedlora
from fedlora.adapters import LoRA
from fedlora.engines.server_optimizer import ServerOptimizer
from fedlora.methods import METHODS
from fedlora.methods._base import Method
from fedlora.methods.fedit import FedIT
from fedlora.methods.rolora import RoLoRA
from fedlora.rounds import Received, public_leaves, server_turn
from fedlora.types import Turn
from tests.fixtures.federation import REFERENCE, config, same, settings


def rounds(optimizer, method, count=4):
    """Shared leaves and plain outcomes, round by round, under random uploads."""
    g = torch.Generator().manual_seed(0)
    shared = {"w": {"A": torch.randn(2, 5, generator=g).double(), "B": torch.zeros(4, 2).double()}}
    for number in range(count):
        uploads = []
        for client, n in enumerate((3, 1)):
            layer = {leaf: x + torch.randn(x.shape, generator=g) for leaf, x in public_leaves(shared["w"]).items()}
            trained = method.trains(layer, Turn(number, client, 2), dict)
            uploads.append(Received(Turn(number, client, 2), n, {"w": {leaf: layer[leaf] for leaf in sorted(trained)}}))
        plain = server_turn({"w": method}, shared, uploads)
        before, shared = shared, optimizer.step(shared, plain).shared
        yield before["w"], plain.shared["w"], shared["w"]


def test_momentum_is_torchs_sgd():
    optimizer = ServerOptimizer("momentum", learning_rate=0.7, beta1=0.8)
    theirs = None
    for before, plain, after in rounds(optimizer, FedIT(LoRA(2))):
        if theirs is None:
            theirs = {leaf: before[leaf].clone().requires_grad_() for leaf in "AB"}
            sgd = torch.optim.SGD(list(theirs.values()), lr=0.7, momentum=0.8)
        for leaf, x in theirs.items():
            x.grad = before[leaf] - plain[leaf]
        sgd.step()
        for leaf, x in theirs.items():
            torch.testing.assert_close(after[leaf], x.detach())


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_adam_and_yogi_are_the_papers(kind):
    lr, b1, b2, tau = 0.1, 0.9, 0.95, 1e-2
    m, v = {}, {}
    for before, plain, after in rounds(ServerOptimizer(kind, lr, b1, b2, tau), FedIT(LoRA(2))):
        for leaf in "AB":
            delta = plain[leaf] - before[leaf]
            m[leaf] = b1 * m.get(leaf, 0) + (1 - b1) * delta
            old = v.get(leaf, torch.full_like(delta, tau**2))
            v[leaf] = b2 * old + (1 - b2) * delta**2
            if kind == "yogi":
                v[leaf] = old - (1 - b2) * delta**2 * torch.sign(old - delta**2)
            torch.testing.assert_close(after[leaf], before[leaf] + lr * m[leaf] / (v[leaf] ** 0.5 + tau))


def test_a_leaf_that_rests_keeps_its_moments_and_stays_the_same_object():
    found = list(rounds(ServerOptimizer("adam"), RoLoRA(LoRA(2))))
    (_, _, first), (_, _, second) = found[:2]
    assert second["B"] is first["B"] and second["_m.B"] is first["_m.B"]
    assert "_m.A" not in first and "_m.A" in second


def test_plain_momentum_of_zero_is_the_method_itself():
    for _, plain, after in rounds(ServerOptimizer("momentum", 1.0, beta1=0.0), FedIT(LoRA(2))):
        torch.testing.assert_close(after["A"], plain["A"])


AVERAGING = [n for n in METHODS.names() if METHODS.load(n).combine is Method.combine and n not in ("flora-na", "local")]


@pytest.mark.parametrize("name", AVERAGING)
def test_on_top_of_any_method_that_averages(name, reference):
    assert {"fedit", "ffa-lora", "fedsa-lora", "ravan", "fed-sb"} <= set(AVERAGING)
    plain = reference(name)
    found = fedlora.run(config(*settings(name), *REFERENCE, "server.optimizer=momentum", "server.beta1=0.5"))
    assert any(leaf.startswith("_m.") for layer in found.shared.values() for leaf in layer)
    assert found.summary["bytes"] == plain.summary["bytes"], "the server's moments never cross the wire"
    assert not same(found.shared, plain.shared)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            ["method.name=flexlora", "server.optimizer=adam"],
            "works on averaged leaves, but FlexLoRA does not average them",
        ),
        (["server.beta1=1.0"], "server.beta1 is 1.0; it lies from 0 to below 1"),
        (["server.learning_rate=0.0"], "server.learning_rate is 0.0; it must be a positive number"),
        (["server.optimizer=sgd"], "server.optimizer is 'sgd'; it should be 'none', 'momentum', 'adam' or 'yogi'"),
    ],
)
def test_mistakes(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(*wrong)
