"""What comes from elsewhere is refused by its header, in a sentence, before anything is made of it."""

import io
import json
import os
import re
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fedlora.engines.loop import Event
from fedlora.files import Limits, RefusedHeaderError, load_about, load_tree, read_header, save_tree
from fedlora.reporting.terminal import PlainConsole
from fedlora.runs.compare import for_label
from fedlora.runs.progress import describe_event
from fedlora.text import display_safe, safe_filename
from fedlora.training.peft_folder import AdapterFolder

SOUND = save({"p/A": torch.zeros(2, 3), "p/B": torch.ones(4, dtype=torch.bfloat16)}, {"about": "{}"})


def made(header, data=b"", claims=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claims is None else claims).to_bytes(8, "little") + text + data


def entry(shape=(2,), dtype="F32", span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


BAD = {
    "empty": b"",
    "short": b"\1\0\0",
    "cut off": SOUND[:-1],
    "longer than it says": SOUND + b"\0",
    "a header larger than the file": made({}, claims=2**20),
    "a header without end": made({}, claims=2**63),
    "no JSON": made(b"{]"),
    "deep": made(b"[" * 100_000),
    "no text": made(b"\xff\xfe\xfd"),
    "a list": made([1]),
    "a name twice": made(b'{"a":{},"a":{}}'),
    "no entry": made({"a": 3}),
    "more than an entry": made({"a": {**entry(), "x": 1}}, bytes(8)),
    "a strange dtype": made({"a": entry(dtype="OBJ")}, bytes(8)),
    "a dtype that is none": made({"a": entry(dtype=["F32"])}, bytes(8)),
    "negative": made({"a": entry(shape=(-2,))}, bytes(8)),
    "a fraction": made({"a": entry(shape=(2.0,))}, bytes(8)),
    "a truth": made({"a": entry(shape=(True, 2))}, bytes(8)),
    "huge": made({"a": entry(shape=(2**47, 2**47))}, bytes(8)),
    "more than it has": made({"a": entry(shape=(2**40,))}, bytes(8)),
    "beyond the end": made({"a": entry(span=(8, 16))}, bytes(8)),
    "overlapping": made({"a": entry(), "b": entry()}, bytes(8)),
    "with a gap": made({"a": entry(), "b": entry(span=(12, 20))}, bytes(20)),
    "backwards": made({"a": entry(span=(8, 0))}, bytes(8)),
    "many dimensions": made({"a": entry(shape=[1] * 9 + [2])}, bytes(8)),
    "a name with an escape": made({"\x1b[31mred": entry()}, bytes(8)),
    "a long name": made({"a" * 513: entry()}, bytes(8)),
    "no name": made({"": entry()}, bytes(8)),
    "notes that are no texts": made({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_header_that_is_not_in_order(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    for source in (content, tmp_path / "x.safetensors"):
        with pytest.raises(RefusedHeaderError) as refused:
            read_header(source)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 400
    with pytest.raises(ValueError, match="cut off or edited"):
        load_tree(tmp_path / "x.safetensors")


def test_a_header_in_order_is_read_as_it_is(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(SOUND)
    for source in (SOUND, tmp_path / "x.safetensors"):
        found = read_header(source)
        assert {k: (e.dtype, e.shape) for k, e in found.tensors.items()} == {
            "p/A": ("F32", (2, 3)),
            "p/B": ("BF16", (4,)),
        }
        assert found.metadata == {"about": "{}"}
    assert read_header(save({"a": torch.zeros(0, 3), "b": torch.zeros(())})).tensors["a"].shape == (0, 3)


def test_limits_hold():
    many = save({f"p/{i}": torch.zeros(1) for i in range(50)})
    for limits, said in (
        (Limits(size=100), "bytes"),
        (Limits(tensors=49), "50 tensors"),
        (Limits(header=64), "header"),
    ):
        with pytest.raises(RefusedHeaderError, match=f"{said}.*the most that is taken"):
            read_header(many, limits)
    assert len(read_header(many, Limits(tensors=50)).tensors) == 50


def test_nothing_is_allocated_for_what_is_only_claimed(tmp_path):
    path = tmp_path / "x.safetensors"
    tracemalloc.start()
    for name in ("a header larger than the file", "a header without end", "more than it has", "huge"):
        path.write_bytes(BAD[name])
        with pytest.raises(ValueError):
            load_tree(path)
    with open(path, "wb") as file:  # a sparse file of 2^37 bytes
        file.write((2**25 + 1).to_bytes(8, "little"))
        file.truncate(2**37)
    with pytest.raises(ValueError, match="are the most"):
        load_tree(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(RefusedHeaderError, match="no file"):
        read_header(tmp_path / "x.safetensors")


def test_notes_that_are_none(tmp_path):
    for about in ("[]", "{", "[" * 100_000):
        save_tree(tmp_path / "x.safetensors", {"p": {"A": torch.zeros(1)}}, {"about": about})
        with pytest.raises(ValueError, match="cut off or edited"):
            load_about(tmp_path / "x.safetensors")
    save_tree(tmp_path / "x.safetensors", {"p": {"A": torch.zeros(1)}})
    with pytest.raises(ValueError, match="cut off or edited"):
        load_about(tmp_path / "x.safetensors")


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        AdapterFolder.open(tmp_path)


def test_a_fold_of_a_partys_state_is_no_path(tmp_path):
    from fedlora.flower.client_store import ClientStore

    store, about = ClientStore(tmp_path), {"pending": 0, "counted": 0, "base_updates_held": 1, "base": ""}
    for name in ("../../secret", "a" * 31, "/etc/passwd"):
        save_tree(
            store.path(0),
            {"leaves/p": {"A": torch.zeros(1)}},
            {"about": json.dumps({**about, "base_updates": [name]})},
        )
        with pytest.raises(ValueError, match="no state of a client"):
            store.load(0)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", ".hidden", "~root", "", "a\0b", "a\nb", "x" * 129])
def test_a_name_that_leads_elsewhere(name):
    with pytest.raises(ValueError, match="becomes a folder's"):
        safe_filename(name, "a compared run")
    table = {"model": {"name": "demo-vit"}, "compare": {name: {"method": {"name": "fedit"}}}}
    with pytest.raises(ValueError, match="becomes a folder's"):
        for_label(table, name)


def test_ordinary_names_stay():
    for name in ("fedit", "50 clients, Dirichlet 0.5", "package.module:Class", "Žižkov"):
        assert safe_filename(name, "a run") == name


def test_terminals_obey_nothing(capsys):
    bad = "\x1b[31m[red]evil[/red]\r\x07\u202e"
    assert display_safe(bad) == "\\x1b[31m[red]evil[/red]\\r\\x07\\u202e"
    assert display_safe("x" * 1000) == "x" * 400 + "..."
    assert describe_event(Event("absent", 0, 1, text=bad)) == f"round 1, client 1: {display_safe(bad)}"
    console = PlainConsole(width=100)
    console.print(bad)
    from rich.table import Table

    table = Table(title=bad)
    table.add_column(bad)
    table.add_row(bad)
    console.print(table)
    out = capsys.readouterr().out
    assert out.count("[red]evil[/red]") == 4 and not set("\x1b\r\x07\u202e") & set(out)


def test_an_array_of_numpys_is_looked_at_first():
    pytest.importorskip("flwr", reason="needs the flower extra")
    from flwr.app import Array

    from fedlora.flower.strategy.arrays import read_tensor

    good = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert read_tensor("k", good).shape == (2, 3)
    stream = io.BytesIO()  # numpy would make 4 TB of this
    told = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}
    np.lib.format.write_array_header_1_0(stream, told)
    lying = stream.getvalue() + bytes(24)
    for data, shape in (
        (good.data[:-1], (2, 3)),
        (good.data, (3, 2)),
        (lying, (2**20, 2**20)),
        (lying, (2, 3)),
        (b"\x80\x04", (1,)),
    ):
        with pytest.raises(ValueError, match="cannot be read"):
            read_tensor("k", Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=data))


def test_a_pattern_that_python_warns_of_is_read_in_silence(tmp_path):
    """Found by fuzzing: with warnings as errors the reader fell over a pattern that another party had written."""
    from fedlora.training.peft_settings import _check_scale

    re.purge()
    _check_scale(tmp_path, "rank_pattern", {"[[a]layer": 4}, {})
    with pytest.raises(ValueError, match="which is no pattern"):
        _check_scale(tmp_path, "rank_pattern", {"(a": 4}, {})
