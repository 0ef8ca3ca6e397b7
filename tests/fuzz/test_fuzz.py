"""Readers of what comes from elsewhere: whatever bytes come, they take them or say in a sentence why not.

``FEDLORA_FUZZ_CASES`` (300) is the number of cases for each reader, ten times as many in the second tier, and
``FEDLORA_FUZZ_SEED`` (0) where they begin; the counts are printed. ``python -m tests.fuzz`` plays longer.
"""

import json
import os
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedlora.engines.comm.compression import Compression
from fedlora.files import RefusedHeaderError, read_header
from fedlora.runs.config import build
from tests.fuzz.playing import MEMORY, Found, Target, memory, one, play
from tests.fuzz.targets import targets

CASES = int(os.environ.get("FEDLORA_FUZZ_CASES", "300"))
SEED = int(os.environ.get("FEDLORA_FUZZ_SEED", "0"))
SLOWER = {"configuration": 15}  # a case of it takes as long as so many others
READERS = list(targets())
BUDGETS = [pytest.param(CASES, id="some"), pytest.param(10 * CASES, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("cases", BUDGETS)
@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_or_refuses(name, cases, tmp_path, capsys):
    found = play(name, targets(tmp_path)[name](), max(5, cases // SLOWER.get(name, 1)), SEED)
    assert found.refused > 0 and found.taken + found.refused == found.cases
    with capsys.disabled():
        print(f"\n  {found}", end="")


@pytest.mark.parametrize("name", [name for name in READERS if name not in SLOWER])
def test_no_input_takes_much_memory(name, tmp_path):
    assert memory(targets(tmp_path)[name](), 30, SEED) < MEMORY


def test_a_crash_is_found():
    """The player is no use if it sees nothing: a reader that raises something else, or refuses what is sound."""

    def broken(data):
        if b"\0" in data:
            raise KeyError("oh")

    with pytest.raises(Found, match="KeyError"):
        play("broken", Target([b"sound"], broken), 500, 0)
    with pytest.raises(Found, match="refuses a sound input"):
        play("refusing", Target([b"sound"], lambda data: int("x")), 1, 0)


def test_an_upload_that_changes_the_aggregate_is_found():
    def careless(data):
        raise AssertionError("the shared leaves changed")

    with pytest.raises(Found, match="shared leaves"):
        one(Target([b""], careless), b"")


SIZES = st.integers(-2, 2**70) | st.integers(0, 9)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "OBJ", "", None, 3]),
        "shape": st.lists(SIZES, max_size=10) | st.none() | st.text(max_size=3),
        "data_offsets": st.lists(SIZES, max_size=3) | st.none(),
        "more": st.none(),
    },
)


@given(st.dictionaries(st.text(max_size=8), ENTRIES | st.none() | st.integers(), max_size=4), st.binary(max_size=64))
@settings(max_examples=max(50, CASES), deadline=None)
def test_headers_that_are_json(header, data):
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    try:
        found = read_header(content)
    except RefusedHeaderError:
        return
    assert all(len(entry.shape) <= 8 for entry in found.tensors.values())
    from safetensors.torch import load

    assert load(content).keys() == found.tensors.keys(), "what is taken, safetensors reads"


LEAVES = st.tuples(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32]),
    st.lists(st.integers(0, 13), max_size=3),
)
FIELDS = st.sampled_from(["", "@codes", "@scale", "@values", "@bits", "@index", "@shape", "@", "@@"])


@cache
def uploads(**setting) -> Target:
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fuzz.targets import upload

    return upload(Compression(**setting))


@pytest.mark.parametrize("setting", [{}, {"up": "int8"}, {"up": "int4", "top_k": 0.3}, {"top_k": 0.02}], ids=str)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["layer.0", "head", "x"]), st.sampled_from("ABC"), FIELDS), LEAVES, max_size=9
    )
)
@settings(max_examples=max(20, CASES // 4), deadline=None)
def test_uploads_of_wrong_leaves(setting, leaves):
    made = {
        f"{part}/{leaf}{field}": torch.ones(shape).to(kind) for (part, leaf, field), (kind, shape) in leaves.items()
    }
    one(uploads(**setting), save(made))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.sampled_from(["int8", "top-k", "../..", "\x1b[31m", "1e400"]), st.just({}),
)  # fmt: skip
TABLES = {
    "model": ["name", "targets", "head", "quantize"], "task": ["name", "data", "train_rows"],
    "method": ["name", "sweeps", "residual_rank"], "adapter": ["name", "rank", "alpha"],
    "training": ["local_steps", "learning_rate", "batch_size"], "server": ["optimizer", "beta1"],
    "compression": ["up", "down", "base_updates", "top_k", "error_feedback", "max_upload_mb", "odd"],
    "flower": ["min_clients", "secure_range"], "evaluation": ["every"], "odd": ["x"],
}  # fmt: skip
SECTIONS = st.sampled_from(sorted(TABLES)).flatmap(
    lambda s: st.tuples(st.just(s), st.dictionaries(st.sampled_from(TABLES[s]), VALUES, max_size=3) | VALUES)
)


@given(st.lists(SECTIONS, max_size=3))
@settings(max_examples=max(20, CASES // 10), deadline=None)
def test_configurations_of_wrong_values(sections):
    table = {"model": {"name": "demo-vit"}, "task": {"name": "image-classification", "data": "digits"}}
    for name, values in sections:
        both = isinstance(values, dict) and isinstance(table.get(name), dict)
        table[name] = {**table[name], **values} if both else values
    try:
        build(table)
    except ValueError as error:
        assert str(error)  # noqa: PT017 - it may be sound, too
