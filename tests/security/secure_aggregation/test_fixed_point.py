"""Fixed point: the stated range and error hold, and nothing is clipped in silence."""

import math

import numpy as np
import pytest
import torch

from fedlora.security.secure_aggregation.fixed_point import FixedPoint


@pytest.mark.parametrize("K", [3, 4, 50, 1000])
@pytest.mark.parametrize("largest", [1e-3, 0.7, 1.0, 16.0, 15.999999, 1000.0])
def test_the_bits_are_as_many_as_fit(largest, K):
    f = FixedPoint(largest, K).bits
    assert largest * 2**f + K / 2 < 2**31
    assert 2 * largest * (1 + 2e-6) * 2**f + K / 2 >= 2**31, "one more would still fit"


def test_the_default_keeps_26_binary_places():
    assert FixedPoint(16.0, 50).bits == 26
    assert FixedPoint(16.0, 50).error_bound(1.0) == pytest.approx(50 * 2.0**-27 + 16 * 2.0**-24, rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("K", [3, 7, 50])
def test_everybody_at_the_end_of_the_range_does_not_wrap(K, sign):
    fixed, weights = FixedPoint(16.0, K), torch.softmax(torch.arange(K).double() / K, 0).tolist()
    total = np.zeros(5, np.uint32)
    for w in weights:
        total += fixed.encode(torch.full((5,), 16.0 * sign), w)
    found = fixed.decode(total, math.fsum(weights))
    assert (found - 16.0 * sign).abs().max() <= fixed.error_bound(math.fsum(weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_number_is_within_half_a_step(dtype):
    fixed = FixedPoint(16.0, 3)
    x = torch.randn(4, 100_003, generator=torch.Generator().manual_seed(0)).to(dtype)  # spans several chunks
    found = fixed.decode(fixed.encode(x, 1.0), 1.0)
    assert found.dtype == torch.float32 and found.shape == (x.numel(),)
    assert ((found.double() - x.double().flatten()).abs() <= 2.0**-27 + x.double().flatten().abs() * 2.0**-24).all()


def test_the_bound_is_of_the_right_size():
    """It is a bound, and no more than a few times what rounding does at worst."""
    K, fixed, g = 50, FixedPoint(16.0, 50), torch.Generator().manual_seed(1)
    x = 0.01 * torch.rand(K, 20_000, generator=g)
    total = sum((fixed.encode(row, 1 / K).astype(np.int64) for row in x), np.zeros(20_000, np.int64))
    found = fixed.decode((total % 2**32).astype(np.uint32), 1.0)
    worst = (found.double() - x.double().mean(0)).abs().max().item()
    assert fixed.error_bound(1.0, 0.01) / 10 < worst <= fixed.error_bound(1.0, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        FixedPoint(16.0, 3).encode(torch.tensor([1.0, bad, 99.0]), 0.1)


@pytest.mark.parametrize("bad", [16.001, -16.001, 1e30])
def test_out_of_range_is_refused_even_at_a_small_weight(bad):
    with pytest.raises(ValueError, match="outside the range of 16"):
        FixedPoint(16.0, 3).encode(torch.tensor([1.0, bad]), 1e-9)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_range_must_be_one(bad):
    with pytest.raises(ValueError, match="The range is"):
        FixedPoint(bad, 3)
