"""Fed-SB's core between frozen factors, and FedDPA's two pairs."""

import pytest
import torch

from fedlora.adapters import DualLoRA, LoRASB
from fedlora.linalg.sums import exact_svd
from fedlora.methods.fed_sb import FedSB
from fedlora.methods.feddpa import FedDPA
from fedlora.rounds import Received, client_start, client_turn, server_turn
from fedlora.types import Factors, Turn
from tests.fixtures.laws import Nudge


def test_fed_sb_is_exact_and_sends_only_the_core():
    method = FedSB(LoRASB(3))
    start = {leaf: x.double() for leaf, x in method.adapter.init(7, 5, 0).items()}
    assert not start["R"].any()
    torch.testing.assert_close(start["A"] @ start["A"].T, torch.eye(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(start["B"].T @ start["B"], torch.eye(3).double(), atol=1e-6, rtol=0)
    uploads, dense = [], torch.zeros(7, 5).double()
    for k, n in enumerate((5, 2, 9)):
        trainer = Nudge(k)
        sent, kept = client_turn({"w": method}, {"w": start}, {}, Turn(0, k, 3), trainer)
        assert set(sent["w"]) == {"R"} and kept["w"] == {}
        dense += n / 16 * start["B"] @ trainer.end["w"]["R"] @ start["A"]
        uploads.append(Received(Turn(0, k, 3), n, sent))
    served = server_turn({"w": method}, {"w": start}, uploads)
    torch.testing.assert_close(method.adapter.delta(served.shared["w"]).dense(), dense)
    assert served.shared["w"]["A"] is start["A"]


def test_a_core_around_a_known_update():
    g = torch.Generator().manual_seed(0)
    f = Factors(torch.randn(9, 6, generator=g).double(), torch.randn(6, 8, generator=g).double())
    for rank in (4, 7):
        fresh = {leaf: x.double() for leaf, x in LoRASB(rank).init(9, 8, 0).items()}
        layer = LoRASB(rank).around(f, fresh)
        torch.testing.assert_close(LoRASB(rank).delta(layer).dense(), exact_svd(f, rank).factors().dense())
        torch.testing.assert_close(layer["B"].T @ layer["B"], torch.eye(rank).double())
        assert {leaf: x.shape for leaf, x in layer.items()} == {leaf: x.shape for leaf, x in fresh.items()}


def test_sizes_of_the_core():
    assert LoRASB(lora_rank=8).size(768, 768) == int((1536 * 8) ** 0.5)
    assert LoRASB(lora_rank=8).size(4, 100) == 4
    with pytest.raises(ValueError, match="adapter.core_rank is 9, more than 5, the smaller side of a weight of 7 x 5"):
        LoRASB(9).init(7, 5, 0)
    with pytest.raises(ValueError, match="adapter.lora_rank is 0"):
        LoRASB(lora_rank=0)


def test_feddpa_shares_one_pair_and_keeps_the_other():
    method = FedDPA(DualLoRA(2, 6.0))
    start = {leaf: x.double() for leaf, x in method.adapter.init(7, 5, 0).items()}
    uploads, ends, stays = [], {}, {}
    for k, n in enumerate((5, 2, 9)):
        trainer = Nudge(k)
        sent, stays[k] = client_turn({"w": method}, {"w": start}, {}, Turn(0, k, 2), trainer)
        assert set(sent["w"]) == {"A", "B"} and set(stays[k]["w"]) == {"A_own", "B_own"}
        ends[k] = trainer.end["w"]
        uploads.append(Received(Turn(0, k, 2), n, sent))
    served = server_turn({"w": method}, {"w": start}, uploads).shared
    mean = {leaf: sum(n / 16 * ends[k][leaf] for k, n in enumerate((5, 2, 9))) for leaf in "AB"}
    for k in range(3):
        layer = client_start({"w": method}, served, stays[k], Turn(1, k, 2))["w"]
        dense = 3.0 * (mean["B"] @ mean["A"] + ends[k]["B_own"] @ ends[k]["A_own"])
        torch.testing.assert_close(method.adapter.delta(layer).dense(), dense)
