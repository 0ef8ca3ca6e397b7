"""PEFT's state dict as a tree of parts and leaves, and base updates beside it, in one record of arrays.

PEFT also reads replies and results, so they have its keys and Flower's own array format, unlike the trees of
``fedlora.flower.wire``.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedlora.files import RefusedHeaderError
from fedlora.text import display_safe
from fedlora.training.peft_keys import FACTOR, PREFIX, strip_wrappers
from fedlora.types import Factors, Layer, Tree

FOLD = "fedlora.fold."  # + part + ".U" or ".V": an update of the base weight
MARK = "fedlora.turn"  # [round, number of base updates] in a reply of `send`
NUMBERS = "fiub"  # kinds of numpy's dtypes that are numbers
UNREADABLE = (  # by numpy
    ValueError, TypeError, KeyError, EOFError, OSError, OverflowError, MemoryError, SyntaxError, RecursionError,
)  # fmt: skip


def parse_key(key: str) -> tuple[str, str, bool]:
    """Return the part and the leaf of a key of PEFT's state dict, and whether it is a factor of a LoRA.

    Raises ``ValueError`` if the key is neither a factor of ``s B A`` nor a module trained in full.
    """
    name = strip_wrappers(key).removeprefix(PREFIX)
    if factor := FACTOR.match(name):
        return factor["part"], factor["leaf"], True
    if ".lora_" in name or "vera_" in name:
        raise ValueError(
            f"the arrays hold {key!r}, which is no factor A or B of a LoRA on a linear layer and cannot be combined; "
            "train without DoRA, VeRA and adapted embeddings."
        )
    if name.endswith(".base_layer.weight") or ".original_module." in name:
        raise ValueError(
            f"the arrays hold {key!r}, a weight of the base model; send what PEFT's get_peft_model_state_dict returns."
        )
    part, _, leaf = re.sub(r"\.modules_to_save\.[^.]+", "", name).rpartition(".")
    return part, leaf, False


def parse_keys(keys: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return (part, leaf) -> key. Raises ``ValueError`` for keys that cannot be combined or occur twice."""
    names: dict[tuple[str, str], str] = {}
    for key in keys:
        part, leaf, _ = parse_key(key)
        if (part, leaf) in names:
            raise ValueError(
                f"the arrays hold {names[part, leaf]!r} and {key!r}, two adapters on one weight; send one adapter."
            )
        names[part, leaf] = key
    return names


@dataclass(frozen=True)
class PeftState:
    """A model's PEFT state dict: float32 leaves by part, the parts with factors, and the original keys."""

    tree: Tree  # part -> A (r n) and B (m r), or the parameters of a module trained in full
    adapted: frozenset[str]
    keys: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "PeftState":
        """Build from a state dict. Raises ``ValueError`` for a key that cannot be combined."""
        keys = parse_keys(tensors)
        tree: dict[str, dict[str, Tensor]] = {}
        for (part, leaf), key in keys.items():
            tree.setdefault(part, {})[leaf] = tensors[key].detach().to("cpu", torch.float32)
        parsed = map(parse_key, tensors)
        adapted = frozenset(part for part, _, is_factor in parsed if is_factor)
        for part in adapted:
            _check_pair(part, tree[part])
        if not adapted:
            raise ValueError(
                "the arrays hold no LoRA factors (keys ending in lora_A.weight); send what PEFT's "
                "get_peft_model_state_dict returns."
            )
        return cls(tree, adapted, keys)

    @classmethod
    def read(cls, arrays: Mapping[str, Array]) -> "PeftState":
        """Build from received arrays. Raises ``ValueError`` for an array that cannot be read."""
        return cls.of({key: read_tensor(key, array) for key, array in arrays.items()})

    def ranks(self) -> dict[str, int]:
        """Return each adapted part's rank."""
        return {part: self.tree[part]["A"].shape[0] for part in self.adapted}


def _check_pair(part: str, layer: Layer) -> None:
    shapes = {leaf: tuple(x.shape) for leaf, x in sorted(layer.items())}
    fits = shapes.keys() == {"A", "B"} and all(len(s) == 2 for s in shapes.values())
    if not fits or shapes["A"][0] != shapes["B"][1]:
        raise ValueError(
            f"the factors of {part!r} do not fit together, found {shapes}; needed are A (r, n) and B (m, r) of one "
            "linear layer."
        )


def check_npy(data: bytes, shape: tuple[int, ...]) -> None:
    """Check the header of an array in numpy's format against the record's shape and the number of bytes.

    Raises ``RefusedHeaderError``. numpy itself would allocate the array of a header before it checks the bytes.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        header_shape, _, dtype = read(stream)
    except UNREADABLE as error:
        raise RefusedHeaderError(f"it is no array in numpy's format ({type(error).__name__})") from error
    size = math.prod(header_shape) * dtype.itemsize
    if dtype.kind not in NUMBERS or tuple(header_shape) != tuple(shape) or size != len(data) - stream.tell():
        raise RefusedHeaderError(
            f"it says {display_safe(tuple(shape), 60)}, its header {display_safe(header_shape, 60)} of "
            f"{dtype.kind}{dtype.itemsize}, and it has {len(data) - stream.tell()} bytes"
        )


def read_tensor(key: str, array: Array) -> Tensor:
    """Return a received array as float32. Raises ``ValueError`` if it cannot be read or is not finite."""
    try:
        check_npy(array.data, tuple(array.shape))
        value = array.numpy()
        x = torch.from_numpy(np.array(value, dtype=np.float32)) if value.dtype.kind == "f" else None
    except UNREADABLE as error:
        raise ValueError(f"{key!r} cannot be read ({type(error).__name__})") from error
    if x is None:
        raise ValueError(f"{key!r} holds {value.dtype} where floats are needed")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{key!r} holds values that are NaN or infinite")
    return x


def split_arrays(arrays: ArrayRecord) -> tuple[dict[str, Array], dict[str, Factors]]:
    """Return the adapter's arrays, and the base updates beside them: part -> the update of its base weight."""
    plain = {key: array for key, array in arrays.items() if not key.startswith(FOLD)}
    return plain, read_base_updates(arrays)


def read_base_updates(arrays: Mapping[str, Array]) -> dict[str, Factors]:
    """Return the base updates among arrays, in float32."""
    parts = [key[len(FOLD) : -2] for key in arrays if key.startswith(FOLD) and key.endswith(".U")]
    return {
        part: Factors(*(read_tensor(key, arrays[key]) for key in (f"{FOLD}{part}.U", f"{FOLD}{part}.V")))
        for part in parts
    }


def encode_base_updates(base_updates: Mapping[str, Factors]) -> dict[str, Array]:
    """Return base updates as two arrays per part."""
    return {
        f"{FOLD}{part}.{side}": Array(getattr(factors, side).contiguous().numpy())
        for part, factors in base_updates.items()
        for side in "UV"
    }


def encode_mark(round: int, base_updates: int) -> Array:
    """Return the mark of a reply of ``send``: the round (from 0) and the node's number of base updates."""
    return Array(torch.tensor([round, base_updates]).numpy())


def read_mark(mark: Array) -> tuple[int, int]:
    """Return the round and the number of base updates of a reply's mark."""
    try:
        round, base_updates = (int(x) for x in mark.numpy())
    except UNREADABLE as error:
        raise ValueError(f"its {MARK!r} cannot be read") from error
    return round, base_updates
