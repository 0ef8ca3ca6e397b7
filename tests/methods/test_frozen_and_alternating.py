"""FFA-LoRA, RoLoRA, FedSA-LoRA and Local: what is trained, sent and kept."""

import pytest
import torch

from fedlora.adapters import LoRA, VeRA
from fedlora.methods.fedsa_lora import FedSALoRA
from fedlora.methods.ffa_lora import FFALoRA
from fedlora.methods.local import Local
from fedlora.methods.rolora import RoLoRA
from tests.fixtures.cohort import Cohort, lora
from tests.fixtures.laws import Nudge, World


def rounds(method, count):
    """What the clients sent in each round, and the worlds' shared trees."""
    world = World(method)
    for round in range(count):
        world.step({client: Nudge(10 * round + client) for client in range(3)})
        yield round, world, world.sent[0]["first"]


@pytest.mark.parametrize(
    "adapter,inner,outer", [(LoRA(2), "A", "B"), (LoRA(2, 4, True), "A", "B"), (VeRA(4), "d", "b")]
)
def test_who_sends_what(adapter, inner, outer):
    for _, world, sent in rounds(FFALoRA(adapter), 3):
        assert set(sent) == {outer}
        assert torch.equal(world.shared["first"][inner], World(FFALoRA(adapter)).shared["first"][inner])
    for round, _, sent in rounds(RoLoRA(adapter), 4):
        assert set(sent) == ({outer} if round % 2 == 0 else {inner})
    for _, world, sent in rounds(FedSALoRA(adapter), 3):
        assert set(sent) == {inner} and set(world.kept[0]["first"]) == {outer}
        assert set(world.kept[0]["head"]) == {"weight", "bias"} and not world.sent[0]["head"]
    for _, world, sent in rounds(Local(adapter), 2):
        assert not sent and set(world.kept[0]["first"]) == {inner, outer}


def test_ffa_serves_the_mean_of_b():
    c = Cohort.drawn(0)
    common = Cohort([c.start["A"]] * 4, c.B, c.examples, c.start)
    assert common.error(FFALoRA(lora(c))) < 1e-10


def test_fedsa_serves_the_mean_of_a_and_leaves_b():
    world = World(FedSALoRA(LoRA(2)))
    before = world.shared["first"]["B"]
    world.step({client: Nudge(client) for client in range(3)})
    w = [n / 16 for n in (5, 2, 9)]
    torch.testing.assert_close(
        world.shared["first"]["A"], sum(x * world.sent[k]["first"]["A"] for k, x in enumerate(w))
    )
    assert world.shared["first"]["B"] is before
    assert not torch.equal(world.kept[0]["first"]["B"], world.kept[1]["first"]["B"])


def test_local_gives_a_client_of_smaller_rank_its_leading_part():
    from fedlora.types import Turn

    adapter = LoRA(8, 16)
    shared = adapter.init(5, 6, 0)
    start = Local(adapter).receive(shared, {}, Turn(0, 0, 3))
    assert start["A"].shape == (3, 6) and start["B"].shape == (5, 3)
    assert adapter.scale(3) == pytest.approx(16 / 3), "its own scale, not the server's"
