"""Arrays in numpy's own format, as Flower's records hold them, looked at before numpy makes anything of them."""

import io

import numpy as np

from fedlora.files import RefusedHeaderError
from fedlora.text import shown

NUMBERS = "fiub"  # kinds of numpy's dtypes that are numbers
MALFORMED = (ValueError, KeyError, EOFError, SyntaxError, RecursionError, MemoryError, OverflowError, TypeError)


def check_npy(data: bytes, shape: tuple[int, ...]) -> None:
    """Refuses numpy's own format where its header does not fit what is told of it, or the bytes that follow.

    ``RefusedHeaderError``; numpy itself would make the array that the header asks for before it looks for its bytes.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        told, _, dtype = read(stream)
    except MALFORMED as error:
        raise RefusedHeaderError(f"it is no array in numpy's format ({type(error).__name__})") from error
    size = dtype.itemsize
    for count in told:
        size *= count
    if dtype.kind not in NUMBERS or tuple(told) != tuple(shape) or size != len(data) - stream.tell():
        raise RefusedHeaderError(
            f"it says {shown(tuple(shape), 60)}, its header {shown(told, 60)} of {dtype.kind}{dtype.itemsize}, and it "
            f"has {len(data) - stream.tell()} bytes"
        )
