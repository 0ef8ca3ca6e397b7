"""PEFT's state dict as a tree of parts and leaves, and base updates beside it, in one record of arrays.

PEFT also reads replies and results, so they have its keys and Flower's own array format, unlike the trees of
``fedlora.flower.wire``.
"""

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedlora.files import RefusedHeaderError
from fedlora.text import display_safe
from fedlora.training.peft_keys import read_keys
from fedlora.types import Factors, Tree

FOLD = "fedlora.fold."  # + part + ".U" or ".V": an update of the base weight
MARK = "fedlora.turn"  # [round, number of base updates] in a reply of `send`
NUMBERS = "fiub"  # kinds of numpy's dtypes that are numbers
UNREADABLE = (  # by numpy
    ValueError, TypeError, KeyError, EOFError, OSError, OverflowError, MemoryError, SyntaxError, RecursionError,
)  # fmt: skip


def parse_keys(keys: Iterable[str]) -> tuple[dict[tuple[str, str], str], frozenset[str]]:
    """Return (part, leaf) -> key in the given order, and the parts that have LoRA factors.

    Raises ``ValueError`` for keys that cannot be combined or occur twice.
    """
    keys = list(keys)
    try:
        parsed = read_keys(keys)
    except ValueError as error:
        raise ValueError(f"the adapter {error}.") from error
    names = {key: (part, leaf) for part, pair in parsed.factors.items() for leaf, key in pair.items()}
    names |= {key: path.rpartition(".")[::2] for path, key in parsed.whole.items()}
    return {names[key]: key for key in keys}, frozenset(parsed.factors)


@dataclass(frozen=True)
class PeftState:
    """A model's PEFT state dict: float32 leaves by part, the parts with factors, and the original keys."""

    tree: Tree  # part -> A (r n) and B (m r), or the parameters of a module trained in full
    adapted: frozenset[str]
    keys: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "PeftState":
        """Build from a state dict. Raises ``ValueError`` for a key that cannot be combined."""
        keys, adapted = parse_keys(tensors)
        tree: dict[str, dict[str, Tensor]] = {}
        for (part, leaf), key in keys.items():
            tree.setdefault(part, {})[leaf] = tensors[key].detach().to("cpu", torch.float32)
        for part in adapted:
            shapes = {leaf: tuple(x.shape) for leaf, x in sorted(tree[part].items())}
            is_pair = shapes.keys() == {"A", "B"} and all(len(shape) == 2 for shape in shapes.values())
            if not is_pair or shapes["A"][0] != shapes["B"][1]:
                raise ValueError(
                    f"the factors of {part!r} do not fit together, found {shapes}; needed are A (r, n) and B (m, r) of "
                    "one linear layer."
                )
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
