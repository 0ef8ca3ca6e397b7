"""A PEFT state dict as a tree and back: types, bits, and values that are refused."""

import numpy as np
import pytest
import torch

from fedlora.training.peft_state import PeftState, to_float32

A, B = (f"base_model.model.h.0.q.lora_{leaf}.weight" for leaf in "AB")
HEAD = "base_model.model.score.bias"


def state(dtype=torch.float32):
    return {B: torch.ones(3, 2, dtype=dtype), A: torch.ones(2, 4, dtype=dtype), HEAD: torch.ones(5, dtype=dtype)}


def test_parts_leaves_ranks_and_the_order_of_keys():
    read = PeftState.of(state(torch.float16))
    assert read.adapted == {"h.0.q"} and read.ranks() == {"h.0.q": 2}
    assert {part: set(layer) for part, layer in read.tree.items()} == {"h.0.q": {"A", "B"}, "score": {"bias"}}
    assert {x.dtype for layer in read.tree.values() for x in layer.values()} == {torch.float32}
    assert list(read.to_state_dict(read.tree, state())) == [B, A, HEAD]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_back_to_a_state_dict(dtype):
    """What changed has the precision of the original; what did not is the original."""
    start = state(dtype)
    read = PeftState.of(start)
    tree = {**read.tree, "h.0.q": {**read.tree["h.0.q"], "A": torch.full((2, 4), 1 / 3)}}
    back = read.to_state_dict(tree, start)
    assert back[B] is start[B] and back[HEAD] is start[HEAD]
    assert back[A].dtype == dtype and torch.equal(back[A], torch.full((2, 4), 1 / 3).to(dtype))


def test_numpy_arrays_have_the_bits_of_tensors():
    start = {key: x.numpy() for key, x in state(torch.float16).items()}
    read = PeftState.of({key: to_float32(key, x) for key, x in start.items()})
    tree = {**read.tree, "h.0.q": {**read.tree["h.0.q"], "A": torch.full((2, 4), 1 / 3)}}
    back = read.to_state_dict(tree, start)
    assert back[B] is start[B] and isinstance(back[A], np.ndarray) and back[A].dtype == np.float16
    assert torch.equal(torch.tensor(back[A]), read.to_state_dict(tree, state(torch.float16))[A])


@pytest.mark.parametrize("like", [torch.ones(2, 4).half(), np.ones((2, 4), np.float16)])
def test_numbers_that_are_too_large_for_their_precision(like):
    read = PeftState.of(state())
    tree = {**read.tree, "h.0.q": {**read.tree["h.0.q"], "A": torch.full((2, 4), 1e6)}}
    with pytest.raises(ValueError, match=r"lora_A.weight' is too large for .*float16; send the adapter in float32"):
        read.to_state_dict(tree, {**state(), A: like})


@pytest.mark.parametrize(
    "value, words",
    [
        ([1.0], "holds a list where a tensor or a numpy array is needed"),
        (torch.ones(2).int(), "holds torch.int32 where floats are needed"),
        (np.ones(2, np.int64), "holds int64 where floats are needed"),
        (np.array(["a"]), "where floats are needed"),
        (torch.tensor([torch.inf]), "NaN or infinite"),
        (np.array([np.nan]), "NaN or infinite"),
    ],
)
def test_values_that_are_refused(value, words):
    with pytest.raises(ValueError, match=words):
        to_float32("k", value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(A), "do not fit together"),
        (lambda s: s.update({A: torch.ones(3, 4)}), "do not fit together"),
        (lambda s: [s.pop(A), s.pop(B)], "hold no LoRA factors"),
        (lambda s: s.update({A.replace(".weight", ".x.weight"): s[A]}), "two adapters on one weight"),
    ],
)
def test_state_dicts_that_are_refused(change, words):
    table = state()
    change(table)
    with pytest.raises(ValueError, match=words):
        PeftState.of(table)
