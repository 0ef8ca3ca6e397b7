"""The base as a log: absences change nothing, the log stays small, and the pretrained weights come back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedlora.adapters import LoRA
from fedlora.engines.base_updates import BaseUpdateLog
from fedlora.engines.comm.channel import Channel
from fedlora.linalg.factors import compact
from fedlora.training.model import Model
from fedlora.types import Factors
from tests.fixtures.networks import network

M, N = 6, 5


def drawn(seed, rank=2, m=M, n=N, size=1.0):
    g = torch.Generator().manual_seed(seed)
    return Factors(size * torch.randn(m, rank, generator=g).double(), torch.randn(rank, n, generator=g).double())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_any_order_of_absences_ends_at_the_same_base(seed):
    g = torch.Generator().manual_seed(seed)
    log, seen, bases = BaseUpdateLog(), [0] * 4, [torch.zeros(M, N).double() for _ in range(4)]
    exact, widest = torch.zeros(M, N).double(), 0
    for round in range(12):
        for client in range(4):
            if torch.rand((), generator=g) < 0.4 or round == 11:
                for f in log.missing_sum(seen[client]).get("w", ()):
                    bases[client] = bases[client] + f.dense()
                    widest = max(widest, f.U.shape[-1])
                seen[client] = len(log)
        if round < 11:
            f = drawn(100 * seed + round)
            exact += f.dense()
            log.append({"w": (f,)})
            log.settle(min(seen))
    for base in bases:
        torch.testing.assert_close(base, exact)
    torch.testing.assert_close(log.total()["w"].dense(), exact)
    assert widest <= min(M, N)


def test_the_log_does_not_grow_where_everybody_is_there():
    log = BaseUpdateLog()
    for round in range(50):
        log.append({"w": (drawn(round),)})
        log.settle(len(log))
    assert len(log) == 50 and not log.entries
    assert log.prefix["w"].U.shape[-1] <= min(M, N)
    torch.testing.assert_close(log.missing_sum(0)["w"][0].dense(), sum(drawn(round).dense() for round in range(50)))
    assert log.missing_sum(50) == {}
    with pytest.raises(ValueError, match="must start anew"):
        log.missing_sum(3)


@pytest.mark.parametrize(("m", "n", "rank"), [(6, 5, 9), (4, 9, 9), (5, 5, 5), (7, 3, 2)])
def test_compacting_keeps_the_product(m, n, rank):
    f = drawn(0, rank, m, n)
    found = compact(f)
    assert found.U.shape[-1] == min(rank, m, n)
    torch.testing.assert_close(found.dense(), f.dense())


def test_a_client_that_was_away_pays_for_what_it_missed_once():
    tree = {"w": {"A": torch.zeros(2, N)}}
    channel, log = Channel(tree, frozenset()), BaseUpdateLog()
    log.append({"w": (drawn(0, 1),)})
    _handed(channel, 0, 0, tree, log)
    log.append({"w": (drawn(1, 1),)})
    _handed(channel, 1, 1, tree, log)
    _handed(channel, 1, 0, tree, log)
    assert [(r.client, r.numbers) for r in channel.ledger] == [(0, M + N), (1, 2 * (M + N)), (0, M + N)]
    assert [channel.count_base_updates(k) for k in range(3)] == [2, 2, 0]


def _handed(channel, round, client, tree, log):
    delivery = channel.compute_delta(client, tree, log)
    channel.record_delivery(round, client, delivery)
    channel.confirm(client, delivery)
    return delivery


def test_a_client_catches_up_round_by_round_while_that_is_no_larger_than_the_sum():
    log = BaseUpdateLog()
    for round in range(4):
        log.append({"w": (drawn(round, 1),)})
    assert [r["w"][0].V.shape[0] for r in log.missing(1)] == [1, 1, 1]
    assert log.missing(4) == []
    log.settle(3)
    first, last = log.missing(0)
    torch.testing.assert_close(first["w"][0].dense(), sum(drawn(i, 1).dense() for i in range(3)))
    assert torch.equal(last["w"][0].U, drawn(3, 1).U)
    for round in range(4, 4 + N):
        log.append({"w": (drawn(round, 1),)})
    [summed] = log.missing(3)
    assert summed["w"][0].V.shape[0] == min(M, N)
    torch.testing.assert_close(summed["w"][0].dense(), sum(drawn(i, 1).dense() for i in range(3, 4 + N)))


def test_a_client_that_forgot_is_sent_everything_again():
    before = {"w": {"A": torch.zeros(2, N)}}
    channel, log = Channel(before, frozenset()), BaseUpdateLog()
    log.append({"w": (drawn(0, 1),)})
    after = {"w": {"A": torch.ones(2, N)}}
    assert _handed(channel, 0, 0, after, log).leaves.keys() == {"w"}
    assert not _handed(channel, 1, 0, after, log).leaves
    channel.forget(0)
    again = _handed(channel, 2, 0, after, log)
    assert torch.equal(again.leaves["w"]["A"], after["w"]["A"]) and (again.first, again.after) == (0, 1)


def attached(**settings):
    model = Model.attach(network("bert"), LoRA(2), **settings)
    part = next(part for part, p in model.parts.items() if isinstance(p.adapter, LoRA))
    model.load(model.initial(0))
    return model, part


@pytest.mark.parametrize("overlay", [False, True])
def test_unfolding_brings_back_the_pretrained_bits(overlay):
    model, part = attached(overlay=overlay)
    ids = torch.arange(3, 12)[None]
    before = model.network(ids).logits
    weight = model.parts[part].module.base.weight.clone()
    for seed in range(3):
        model.fold({part: (Factors(*(x.float() for x in drawn(seed, 2, 48, 48))),)})
    assert not torch.allclose(model.network(ids).logits, before)
    model.unfold()
    assert torch.equal(model.parts[part].module.base.weight, weight)
    assert torch.equal(model.network(ids).logits, before)


def test_an_overlay_is_the_same_base():
    base_updates = [Factors(*(x.float() for x in drawn(seed, 30, 48, 48, 0.01))) for seed in range(4)]
    logits = []
    for overlay in (False, True):
        model, part = attached(overlay=overlay)
        for f in base_updates:
            model.fold({part: (f,)})
        logits.append(model.network(torch.arange(3, 12)[None]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert model.parts[part].module.overlay.U.shape[-1] == 48, "120 ranks come to 48"


def test_small_updates_are_not_rounded_away_in_bfloat16():
    """Added to a bfloat16 weight, an update a thousand times smaller than it would be lost."""
    model, part = attached(precision="bf16")
    module = model.parts[part].module
    f = Factors(*(x.float() for x in drawn(0, 2, 48, 48, 1e-5)))
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    before = module.base(x.bfloat16()).float()
    model.fold({part: (f,)})
    kept = (x @ module.overlay.V.mT) @ module.overlay.U.mT
    torch.testing.assert_close(kept, x @ f.dense().mT)
    assert torch.equal(module.base(x.bfloat16()).float(), before)


class Int8(nn.Linear):
    """A quantised weight as quantising libraries hold it: integers, and a scale beside them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def test_a_quantised_base_takes_base_updates_as_an_overlay():
    net = network("bert")
    attention = net.bert.encoder.layer[0].attention.self
    attention.query = Int8(attention.query)
    model = Model.attach(net, LoRA(2), ["query"])
    model.load(model.initial(0))
    part = next(p for p in model.parts if p.endswith("0.attention.self.query"))
    module = model.parts[part].module
    f = Factors(*(x.float() for x in drawn(0, 2, 48, 48)))
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    before = module(x)
    model.fold({part: (f,)})
    torch.testing.assert_close(module(x), before + x @ f.dense().mT)
    assert module.base.weight.dtype == torch.int8
