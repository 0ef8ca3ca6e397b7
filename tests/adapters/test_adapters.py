"""Each parametrisation: it starts at no update, its forward pass is its update, and its scale is its own."""

import pytest
import torch

from fedlora.adapters import DualLoRA, LoRA, MultiHead, VeRA

ADAPTERS = [LoRA(3, 5), LoRA(3, 5, use_rslora=True), VeRA(6), MultiHead(2, 3), MultiHead(3, 2, basis="normal")]
M, N = 7, 11


def filled(adapter, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        leaf: x.double() + torch.randn(x.shape, generator=g).double() * (leaf in adapter.trainable)
        for leaf, x in adapter.init(M, N, 3).items()
    }


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_it_starts_at_no_update_and_the_seed_decides(adapter):
    first, again, other = adapter.init(M, N, 3), adapter.init(M, N, 3), adapter.init(M, N, 4)
    assert not adapter.delta(first).dense().any()
    assert all(torch.equal(x, again[leaf]) for leaf, x in first.items())
    differs = any(not torch.equal(x, other[leaf]) for leaf, x in first.items())
    assert differs != isinstance(adapter, VeRA), "VeRA's pair comes from a seed of its own, one for all weights"


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_the_forward_pass_is_the_update(adapter):
    layer = filled(adapter)
    x = torch.randn(2, 5, N, dtype=torch.float64)
    torch.testing.assert_close(adapter.forward(x, layer), x @ adapter.delta(layer).dense().mT)


def test_scales():
    layer = filled(LoRA(3, 5))
    torch.testing.assert_close(LoRA(3, 5).delta(layer).dense(), 5 / 3 * layer["B"] @ layer["A"])
    torch.testing.assert_close(LoRA(3, 5, True).delta(layer).dense(), 5 / 3**0.5 * layer["B"] @ layer["A"])
    small = LoRA(3, 5).leading(layer, 2)
    torch.testing.assert_close(LoRA(3, 5).delta(small).dense(), 5 / 3 * layer["B"][:, :2] @ layer["A"][:2])


def test_vera_holds_one_pair_for_all_weights_of_a_shape():
    a, b = VeRA(6).init(M, N, 1), VeRA(6).init(M, N, 2)
    assert a["A"] is b["A"]
    assert a["B"] is b["B"]
    dense = torch.diag(torch.ones(M)) @ a["B"] @ torch.diag(a["d"]) @ a["A"]
    torch.testing.assert_close(VeRA(6).delta({**a, "b": torch.ones(M)}).dense(), dense)


@pytest.mark.parametrize(
    "kind, settings, key",
    [
        (LoRA, {"alpha": 0.0}, "alpha"), (LoRA, {"alpha": -4.0}, "alpha"), (LoRA, {"alpha": float("inf")}, "alpha"),
        (DualLoRA, {"alpha": 0.0}, "alpha"), (LoRA, {"rank": 0}, "rank"), (VeRA, {"rank": 0}, "rank"),
        (VeRA, {"d_initial": 0.0}, "d_initial"), (MultiHead, {"head_rank": -1}, "head_rank"),
        (MultiHead, {"lora_rank": 0}, "lora_rank"), (MultiHead, {"heads": 0}, "heads"),
    ],
)  # fmt: skip
def test_numbers_with_which_nothing_could_be_learnt_are_refused(kind, settings, key):
    with pytest.raises(ValueError, match=f"adapter.{key} is "):
        kind(**settings)
