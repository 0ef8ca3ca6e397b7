"""The lift over the model: stacking changes nothing, untouched leaves stay the same objects."""

import pytest
import torch

from fedlora.adapters import LoRA
from fedlora.methods import METHODS
from fedlora.methods.fedit import FedIT
from fedlora.methods.ffa_lora import FFALoRA
from fedlora.methods.flora_na import FLoRANA
from fedlora.rounds import Received, client_turn, group_by_shape, server_turn, shares
from fedlora.types import Turn
from tests.fixtures.cohort import Cohort
from tests.fixtures.laws import ADAPTERS, Nudge, World


def uploads(cohorts):
    return [
        Received(Turn(1, k, 3), 1 + k, {p: {"A": c.A[k], "B": c.B[k]} for p, c in cohorts.items()}) for k in range(4)
    ]


@pytest.mark.parametrize("method", [FedIT(LoRA(3)), FLoRANA(LoRA(3))])
def test_weights_of_one_shape_together_are_as_one_by_one(method):
    cohorts = {"a": Cohort.drawn(0), "b": Cohort.drawn(1), "c": Cohort.drawn(2, m=5)}
    both = server_turn(dict.fromkeys(cohorts, method), {p: c.start for p, c in cohorts.items()}, uploads(cohorts))
    for part, c in cohorts.items():
        one = server_turn({part: method}, {part: c.start}, uploads({part: c}))
        for leaf in "AB":
            torch.testing.assert_close(both.shared[part][leaf], one.shared[part][leaf])


def test_a_leaf_nobody_sent_is_the_same_object():
    c = Cohort.drawn(0)
    sent = [Received(Turn(0, k, 3), 1, {"w": {"B": B}}) for k, B in enumerate(c.B)]
    made = server_turn({"w": FFALoRA(LoRA(3))}, {"w": c.start}, sent).shared["w"]
    assert made["A"] is c.start["A"] and made["B"] is not c.start["B"]


def test_shapes_that_do_not_fit_are_refused_with_both_shapes():
    c = Cohort.drawn(0)
    sent = uploads({"w": c})
    sent[1] = Received(Turn(1, 1, 2), 2, {"w": {"A": c.A[1][:2], "B": c.B[1][:, :2]}})
    with pytest.raises(ValueError, match=r"leaf 'A': clients sent shapes \[\(1, 2, 8\), \(1, 3, 8\)\].*same rank"):
        server_turn({"w": FedIT(LoRA(3))}, {"w": c.start}, sent)


def test_shares():
    assert shares(FedIT(), [1, 3]) == [0.25, 0.75]
    assert shares(FedIT(weighting="uniform"), [1, 3]) == [0.5, 0.5]
    with pytest.raises(ValueError, match="0 training rows"):
        shares(FedIT(), [0, 0])


def test_a_round_without_clients_changes_nothing():
    c = Cohort.drawn(0)
    assert server_turn({"w": FedIT()}, {"w": c.start}, []).shared["w"] is c.start


def test_the_order_of_leaves_has_no_influence_on_how_parts_are_grouped():
    x = torch.zeros(2, 3)
    layers = {"a": {"A": x, "B": x}, "b": {"B": x, "A": x}}
    assert group_by_shape(["a", "b"], lambda part: [layers[part]]) == [["a", "b"]]


@pytest.mark.parametrize("name", METHODS.names())
def test_replies_in_any_order_give_the_same_bits(name):
    """Over a network they arrive in any order, and sums of floating-point numbers depend on it."""
    kind = METHODS.load(name)
    world = World(kind(adapter=ADAPTERS[kind.adapters[0]][0]))
    uploads = []
    for client in range(3):
        turn = world.turn(client)
        sent, _ = client_turn(world.rules, world.shared, {}, turn, Nudge(client))
        uploads.append(Received(turn, world.examples[client], sent))
    one, other = (server_turn(world.rules, world.shared, some) for some in (uploads, uploads[::-1]))
    for part, layer in one.shared.items():
        assert all(torch.equal(x, other.shared[part][leaf]) for leaf, x in layer.items()), part
    assert one.base_updates.keys() == other.base_updates.keys()
    for part, base_updates in one.base_updates.items():
        assert all(
            torch.equal(a, b) for f, g in zip(base_updates, other.base_updates[part], strict=True) for a, b in zip(f, g)
        ), part
