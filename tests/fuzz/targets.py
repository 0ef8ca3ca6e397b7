"""The readers, each with sound inputs to begin from: bytes in; what comes back is sound, or a ``ValueError`` says why."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from fedlora.adapters import Dense
from fedlora.engines.checkpoint import FORM, Checkpoints
from fedlora.engines.comm.compression import Compression
from fedlora.files import encode_state, encode_tree, load_tree, read_header, upload_limits, write_verified_file
from fedlora.methods.fedit import FedIT
from fedlora.rounds import Received
from fedlora.runs.config import read
from fedlora.security.validation import UploadScreen, Validation
from fedlora.training.peft_folder import WEIGHTS, AdapterFolder
from fedlora.training.peft_settings import CONFIG
from fedlora.types import Turn

DRAWS = torch.Generator().manual_seed(0)


class Target(NamedTuple):
    """A reader. ``read`` raises ``ValueError`` for what it refuses and ``AssertionError`` where it took what it must not."""

    corpus: Sequence[bytes]
    read: Callable[[bytes], None]


def numbers(*shape):
    return torch.randn(shape, generator=DRAWS)


def trees():
    one = {"layer.0": {"A": numbers(2, 6), "B": numbers(5, 2)}, "head": {"weight": numbers(3, 5), "bias": numbers(3)}}
    return [one, {}, {"layer.0": {"A": numbers(2, 6).bfloat16()}}]


def contents():
    return [encode_tree(tree, {"format": "pt", "about": "{}"}) for tree in trees()]


def header() -> Target:
    def look(data: bytes) -> None:
        found = read_header(data, upload_limits(1))
        assert len(data) <= 10**6 and all(name.isprintable() for name in found.tensors)

    return Target(contents(), look)


def tree_file(place: Path) -> Target:
    path = place / "tree.safetensors"

    def look(data: bytes) -> None:
        path.write_bytes(data)
        size = sum(x.numel() * x.element_size() for layer in load_tree(path).values() for x in layer.values())
        assert size <= len(data)

    return Target(contents(), look)


def upload(compression: Compression) -> Target:
    """An upload on its way to the aggregate: what is taken has the leaves' shapes and plain numbers."""
    from flwr.app import Array, ArrayRecord

    from fedlora.flower.wire import STYPE, record_to_tree

    method = FedIT()
    rules = {"layer.0": method, "head": FedIT(Dense(frozenset({"weight", "bias"})))}
    shared = {"layer.0": method.adapter.init(9, 12, 0), "head": {"weight": numbers(3, 5), "bias": numbers(3)}}
    turn = Turn(0, 0, method.adapter.budget, seed=3)
    before = {part: {leaf: x.clone() for leaf, x in layer.items()} for part, layer in shared.items()}

    def one(seed: int) -> bytes:
        sent = {part: {leaf: x + 0.1 for leaf, x in layer.items()} for part, layer in shared.items()}
        found = compression.encode_upload(rules, shared, {}, Turn(0, 0, turn.rank, seed), sent, {p: {} for p in sent})
        return encode_tree(found.encoded)

    def look(data: bytes) -> None:
        record = ArrayRecord({"leaves": Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})
        try:
            screen = UploadScreen(Validation(), rules, shared, {})
            sent = compression.decode_upload(rules, shared, turn, record_to_tree(record, upload_limits(1)))
            found = screen.check(Received(turn, 10, sent))
            if found is None:
                raise ValueError(screen.rejected[0].reason)
            tree = found.tree
        finally:
            assert all(torch.equal(x, shared[p][k]) for p, layer in before.items() for k, x in layer.items())
        for part, layer in tree.items():
            for leaf, x in layer.items():
                assert x.shape == shared[part][leaf].shape and x.dtype == torch.float32 and bool(x.isfinite().all())

    return Target([one(3), one(4)], look)


def base_update_message() -> Target:
    from flwr.app import Array, ArrayRecord

    from fedlora.flower.wire import STYPE, base_updates_to_record, record_to_base_updates
    from fedlora.types import Factors

    base_updates = [
        {"layer.0": (Factors(numbers(5, 2), numbers(2, 6)),)},
        {"layer.0": (Factors(numbers(5, 1), numbers(1, 6)),)},
    ]

    def look(data: bytes) -> None:
        array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
        record_to_base_updates(ArrayRecord({"leaves": array}))

    return Target([base_updates_to_record(base_updates)["leaves"].data], look)


def adapter_weights(place: Path) -> Target:
    folder = place / "weights"
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    key = "base_model.model.q.lora_{}.weight"
    sound = [
        save(
            {key.format("A"): numbers(2, 6), key.format("B"): numbers(5, 2), "base_model.model.head.weight": numbers(3)}
        )
    ]

    def look(data: bytes) -> None:
        (folder / WEIGHTS).write_bytes(data)
        found = AdapterFolder.open(folder)
        for part, (m, n, r) in found.shapes.items():
            layer = found.layer(part)
            assert tuple(layer["A"].shape) == (r, n) and tuple(layer["B"].shape) == (m, r)
            found.verify(part, layer)
        found.modules()

    return Target(sound, look)


def adapter_settings(place: Path) -> Target:
    folder = place / "settings"
    folder.mkdir()
    key = "base_model.model.q.lora_{}.weight"
    (folder / WEIGHTS).write_bytes(save({key.format("A"): numbers(2, 6), key.format("B"): numbers(5, 2)}))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "bias": "none",
                "rank_pattern": {"q": 2}, "alpha_pattern": {"^q": 8.0}, "init_lora_weights": True}  # fmt: skip
    sound = [json.dumps(settings).encode(), json.dumps(settings, indent=2).encode(), b'{"peft_type": "LORA"}']

    def look(data: bytes) -> None:
        (folder / CONFIG).write_bytes(data)
        found = AdapterFolder.open(folder)
        for part in found.shapes:
            found.lora(part)

    return Target(sound, look)


def checkpoint(place: Path) -> Target:
    kept = Checkpoints(place / "checkpoints", "config", "accuracy")
    said = {"form": FORM, "config": "config", "private": {"0": None}, "base_updates": [], "inputs": {}, "number": 3}
    sound = [encode_state(trees()[0], said)]

    def look(data: bytes) -> None:
        name = write_verified_file(kept.folder, "000003", data)  # even where the name tells its digest
        try:
            kept.newest()
        finally:
            (kept.folder / name).unlink()

    return Target(sound, look)


def party_state(place: Path) -> Target:
    from fedlora.flower.client_store import ClientStore, StoredState

    store, tree = ClientStore(place / "state"), trees()[0]
    path = store.path(0)
    sound = []
    for holding in (
        StoredState(leaves=tree, kept=tree, pending=3),
        StoredState(base_updates=("0" * 32,), base_updates_held=1, base="x", trained=tree),
    ):
        store.save(0, holding)
        sound.append(path.read_bytes())

    def look(data: bytes) -> None:
        path.write_bytes(data)
        for name in store.load(0).base_updates:
            assert store._base_update_path(name).resolve().parent == (store.folder / "base_updates").resolve()

    return Target(sound, look)


def configuration(place: Path) -> Target:
    path = place / "config.toml"
    sound = [
        b"""rounds = 3
seed = 1
[model]
name = "demo-vit"
[task]
name = "image-classification"
data = "digits"
train_rows = 90
[clients]
count = 5
per_round = 2
partition = { name = "dirichlet", alpha = 0.5 }
[method]
name = "svd"
sweeps = 2
[adapter]
name = "lora"
rank = 4
[training]
local_steps = 2
learning_rate = 5e-3
[compression]
up = ["top-k", "int8"]
down = "bfloat16"
top_k = 0.1
""",
        b"""rounds = 2
[model]
name = "demo-vit"
start = "x"
[task]
name = "text-classification"
data = "y"
[clients]
ranks = [1, 2]
dropout = 0.2
[method]
name = "flora"
[flower]
min_clients = 3
[evaluation]
every = 2
""",
    ]

    def look(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return Target(sound, look)


def targets(place: Path | None = None) -> dict[str, Callable[[], Target]]:
    """Every reader by its name; what needs Flower is left out where it is missing."""
    memory = Path("/dev/shm")  # where a file costs no disk
    place = place or Path(tempfile.mkdtemp(prefix="fedlora-fuzz-", dir=memory if memory.is_dir() else None))
    found: dict[str, Callable[[], Target]] = {
        "header": header,
        "tree file": lambda: tree_file(place),
        "adapter weights": lambda: adapter_weights(place),
        "adapter settings": lambda: adapter_settings(place),
        "checkpoint": lambda: checkpoint(place),
        "configuration": lambda: configuration(place),
    }
    try:
        import flwr  # noqa: F401
    except ImportError:
        return found
    return found | {
        "upload": lambda: upload(Compression()),
        "upload in int8": lambda: upload(Compression(up="int8")),
        "upload in top-k and int4": lambda: upload(Compression(up="int4", top_k=0.3)),
        "upload in few places": lambda: upload(Compression(top_k=0.02)),
        "base_updates": base_update_message,
        "party state": lambda: party_state(place),
    }
