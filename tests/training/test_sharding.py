"""Parameters that are divided over processes: FSDP2's are whole again, and other wrappers are refused."""

import pytest
import torch
from torch import nn

from fedlora.training.sharding import (
    add_value,
    check_shapes,
    check_wrappers,
    distribute_like,
    is_fully_sharded,
    is_sharded,
    reshard,
)
from tests.fixtures.rank_pair import PROCESSES, read_results, start_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return start_pair("sharding", tmp_path_factory.mktemp("sharding"))


def test_a_plain_parameter():
    linear = nn.Linear(3, 2)
    value = torch.full((2, 3), 0.5)
    before = linear.weight.detach().clone()
    assert not is_sharded(linear.weight) and not is_fully_sharded(linear)
    assert distribute_like(linear.weight, value) is value
    place = linear.weight.data_ptr()
    add_value(linear.weight, value)
    assert torch.equal(linear.weight, before + 0.5) and linear.weight.data_ptr() == place
    assert linear.weight.requires_grad and linear.weight.grad is None
    reshard(nn.Sequential(linear))  # without a process group
    check_wrappers(linear)


def test_other_wrappers_are_refused_by_the_parameter():
    zero = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    zero[1].bias.ds_id = 7  # as DeepSpeed marks them
    with pytest.raises(ValueError, match=r"'1.bias' is divided by DeepSpeed's ZeRO stage 3, .*or ZeRO stage 1 or 2"):
        check_wrappers(zero)

    class FlatParameter(nn.Parameter):
        pass

    flat = nn.Module()
    flat._flat_param = FlatParameter(torch.ones(4))
    with pytest.raises(ValueError, match="'_flat_param' is flattened by FSDP version 1.*use FSDP2"):
        check_wrappers(flat)
    original = nn.Linear(2, 2)
    original.weight._fsdp_flattened = True  # with use_orig_params=True
    with pytest.raises(ValueError, match="'weight' is flattened by FSDP version 1"):
        check_wrappers(original)


def test_a_leaf_keeps_its_kind_and_its_shape():
    start = {"fc": {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}}
    whole = {"fc": {"A": nn.Parameter(torch.zeros(2, 4)), "B": nn.Parameter(torch.zeros(4, 2))}}
    check_shapes(start, whole)
    check_shapes(start, {"fc": {"B": whole["fc"]["B"]}})
    with pytest.raises(
        ValueError, match=r"A of 'fc' was a parameter of shape \(2, 4\), and is a Parameter of shape \(8,\)"
    ):
        check_shapes(start, {"fc": {**whole["fc"], "A": nn.Parameter(torch.zeros(8))}})
    with pytest.raises(ValueError, match=r"and is a Tensor of shape \(4, 2\) after training"):
        check_shapes(start, {"fc": {**whole["fc"], "B": torch.zeros(4, 2)}})


@pytest.mark.xdist_group("parallel")
def test_a_parameter_of_fsdp2_in_two_processes(pair):
    results = read_results(pair)
    for rank in range(PROCESSES):
        assert results[rank]["is_sharded"] == [True, True, True], "the network, its weight, and a value divided like it"
        assert results[rank]["local rows"] == [3, 2][rank], "of 5: the value is in parts"
        assert torch.equal(results[rank]["whole"], results[rank]["value"])
        assert torch.equal(results[rank]["sum"], results[rank]["before"] + results[rank]["value"])
        assert results[rank]["twice"], "a value that is divided already is left as it is"
    assert torch.equal(results[0]["sum"], results[1]["sum"])


@pytest.mark.xdist_group("parallel")
def test_parameters_that_a_forward_pass_has_gathered_are_put_back(pair):
    for result in read_results(pair):
        assert result["gathered"] == [True, False, True], "before the pass, after it, and put back"
        assert torch.equal(result["written"], torch.full((5, 4), 2.0)), "a value written then is not lost"
