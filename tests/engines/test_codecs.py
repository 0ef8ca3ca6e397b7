"""Codecs: the error is within what each promises, rounding at random is right in the mean, and forms are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.engines.comm.codecs import CODECS
from fedlora.engines.comm.codecs._base import Chain, from_lines, in_lines

CHAINS = [[name] for name in CODECS.names()] + [["top-k", name] for name in CODECS.names() if name != "top-k"]
SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple) | st.sampled_from([(3, 700), (700, 3), (1, 1)])
SIZES = st.sampled_from([0.0, 1e-42, 1e-30, 1e-6, 1.0, 1e4])


def chain(names, share=0.3):
    return Chain(tuple(CODECS.load(name)(**({"share": share} if name == "top-k" else {})) for name in names))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(shape, size, seed):
    made = draws(seed)
    x = torch.randn(shape, generator=made) * size
    return torch.where(torch.rand(shape, generator=made) < 0.1, torch.zeros_like(x), x)


def test_the_codecs_are_the_files():
    assert CODECS.names() == ["bfloat16", "float16", "int4", "int8", "top-k"]
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        CODECS.load("bfloat")


@pytest.mark.parametrize("names", CHAINS, ids="+".join)
@given(shape=SHAPES, size=SIZES, seed=st.integers(0, 2**32), share=st.sampled_from([0.01, 0.3, 0.99]))
@settings(max_examples=60, deadline=None)
def test_the_error_is_within_the_bound_and_the_form_is_exact(names, shape, size, seed, share):
    x, c = numbers(shape, size, seed), chain(names, share)
    coded = c.encode(x, draws(seed))
    assert {k: (tuple(v.shape), v.dtype) for k, v in coded.items()} == c.form(shape)
    back = c.decode(coded, shape)
    assert back.shape == x.shape and back.dtype == torch.float32
    assert bool(((back - x).abs().double() <= c.bound(x).double()).all()), (back - x).abs().max()
    again = c.encode(x, draws(seed))
    assert all(torch.equal(again[k], coded[k]) for k in coded), "the generator decides all"
    meta = c.encode(x.to("meta"), draws())
    assert {k: (tuple(v.shape), v.dtype) for k, v in meta.items()} == c.form(shape)


@given(shape=SHAPES)
@settings(max_examples=50, deadline=None)
def test_lines_lie_along_the_longest_axis(shape):
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    lines = in_lines(x)
    assert lines.shape[1] == max(shape, default=1)
    assert torch.equal(from_lines(lines, shape), x)


@pytest.mark.parametrize("name,step", [("int8", 1 / 127), ("int4", 1 / 7)])
def test_rounding_at_random_is_right_in_the_mean(name, step):
    """The mean of many draws lies within five standard errors of x; rounding to the nearest would not."""
    x, many = torch.tensor([[1.0, 0.31, -0.777, 0.003, -1.0, 0.5]]), 20_000
    c, line = chain([name]), x.repeat(1, many)  # one line has one scale, and each number a draw of its own
    mean = c.decode(c.encode(line, draws(5)), line.shape).reshape(many, 6).double().mean(0)
    assert bool(((mean - x).abs() <= 5 * step / 2 / many**0.5 + 1e-6).all()), mean - x


def test_a_factor_has_as_many_scales_as_ranks():
    for shape in ((4, 96), (96, 4)):
        form = chain(["int8"]).form(shape)
        assert form["scale"][0] == (4,)
        assert sum(torch.Size(s).numel() * kind.itemsize for s, kind in form.values()) == 4 * 96 + 4 * 4


def test_places_are_told_in_the_fewer_bytes():
    few, many = (chain(["top-k", "int8"], share).form((64, 64)) for share in (0.01, 0.1))
    assert few["index"] == ((41,), torch.int32) and many["bits"] == ((512,), torch.uint8)
    x = numbers((64, 64), 1.0, 3)
    kept = chain(["top-k"], 0.01)
    back = kept.decode(kept.encode(x, draws()), (64, 64))
    assert int((back != 0).sum()) == 41
    assert back.abs()[back != 0].min() >= x.abs()[back == 0].max()


@pytest.mark.parametrize("names", CHAINS, ids="+".join)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_at_the_other_end(names, bad):
    x = numbers((6, 8), 1.0, 1)
    x[2, 3] = bad
    c = chain(names)
    assert not c.decode(c.encode(x, draws()), (6, 8)).isfinite().all()


def test_float16_says_what_it_cannot_hold():
    with pytest.raises(ValueError, match="bfloat16 instead"):
        chain(["float16"]).encode(torch.tensor([7e4]), draws())


@pytest.mark.parametrize("names", CHAINS, ids="+".join)
def test_fields_of_another_form_are_refused_before_they_are_read(names):
    c = chain(names)
    coded = c.encode(numbers((6, 40), 1.0, 1), draws())
    for name, x in coded.items():
        for other in (x[:-1], x.to(torch.float64), x[None]):
            with pytest.raises(ValueError, match=name):
                c.decode({**coded, name: other}, (6, 40))
    with pytest.raises(ValueError, match="strange"):
        c.decode({**coded, "strange": torch.zeros(1)}, (6, 40))
    with pytest.raises(ValueError):
        c.decode({}, (6, 40))


def test_places_that_are_none_are_refused():
    few, many = chain(["top-k"], 0.01), chain(["top-k"], 0.3)
    coded = few.encode(numbers((20, 20), 1.0, 1), draws())
    for places in ([0, 1, 2, 400], [-1, 1, 2, 3], [3, 2, 1, 0], [5, 5, 5, 5]):
        with pytest.raises(ValueError, match="positions"):
            few.decode({**coded, "index": torch.tensor(places, dtype=torch.int32)}, (20, 20))
    coded = many.encode(numbers((20, 20), 1.0, 1), draws())
    with pytest.raises(ValueError, match="marks 400 positions"):
        many.decode({**coded, "bits": torch.full((50,), 255, dtype=torch.uint8)}, (20, 20))


def test_stages_that_cannot_follow_each_other():
    for names in (["int8", "top-k"], ["top-k", "top-k"], ["int8", "int4"]):
        with pytest.raises(ValueError, match="cannot follow"):
            chain(names)
