"""PEFT's state dict, and base updates beside it, in one record of arrays.

PEFT also reads replies and results, so they have its keys and Flower's own array format, unlike the trees of
``fedlora.flower.wire``.
"""

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedlora.files import RefusedHeaderError
from fedlora.text import display_safe
from fedlora.training.peft_state import PeftState, to_float32
from fedlora.types import Factors

FOLD = "fedlora.fold."  # + part + ".U" or ".V": an update of the base weight
MARK = "fedlora.turn"  # [round, number of base updates] in a reply of `send`
NUMBERS = "fiub"  # kinds of numpy's dtypes that are numbers
UNREADABLE = (  # by numpy
    ValueError, TypeError, KeyError, EOFError, OSError, OverflowError, MemoryError, SyntaxError, RecursionError,
)  # fmt: skip


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
    except UNREADABLE as error:
        raise ValueError(f"{key!r} cannot be read ({type(error).__name__})") from error
    return to_float32(key, value)


def read_state(arrays: Mapping[str, Array]) -> PeftState:
    """Return a received adapter. Raises ``ValueError`` for an array that cannot be read."""
    return PeftState.of({key: read_tensor(key, array) for key, array in arrays.items()})


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
