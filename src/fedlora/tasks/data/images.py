"""Images from a column of files, encoded bytes, raw pixels or arrays, as uint8 tensors."""

import io
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.tasks.data.rows import check_column

GREY = ("1", "L", "LA", "La")
COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV")
BATCH = 512  # images that are decoded at a time: a decoded split may be far larger than the resized one


def read_images(split: Any, name: str, shape: Sequence[int] | None, role: str) -> Iterator[list[Tensor]]:
    """Yield a column's images, uint8 (height, width, 1 or 3 channels), in batches.

    ``shape`` is the shape of raw bytes. Raises ``ValueError`` with the row of an image that cannot be read.
    """
    import datasets

    check_column(split, name, "task.image")
    split = split.select_columns([name])
    if isinstance(split.features[name], datasets.Image):  # decoded below, so that an error has the row
        split = split.cast_column(name, datasets.Image(decode=False))
    for start in range(0, len(split), BATCH):
        values = split[start : start + BATCH][name]
        yield [_to_tensor(value, shape, f"column {name!r}, {role} row {start + i}") for i, value in enumerate(values)]


def _to_tensor(value: Any, shape: Sequence[int] | None, where: str) -> Tensor:
    """Return an image as uint8 without transparency, which models do not use."""
    if isinstance(value, dict):
        path = value.get("path")
        where = f"{where} ({path})" if path else where
        try:
            value = Path(path).read_bytes() if path and value.get("bytes") is None else value.get("bytes")
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror}; put the file back or drop the row.") from error
    if value is None:
        raise ValueError(f"{where} has no picture; drop the row.")
    if isinstance(value, bytes) and shape is not None:
        height, width, channels = shape
        size = height * width * channels
        if len(value) != size:
            need = f"the shape {list(shape)} needs {size}; correct task.image_shape"
            raise ValueError(f"{where} has an image of {len(value)} bytes; {need}.")
        image = torch.frombuffer(bytearray(value), dtype=torch.uint8).reshape(height, width, channels)
    else:
        image = _from_array(_decode(value, where) if isinstance(value, bytes) else value, where)
    return image[..., :-1] if image.shape[-1] in (2, 4) else image


def _decode(value: bytes, where: str) -> Any:
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(io.BytesIO(value))
        # A phone's MPO file has the photograph and a small copy of it.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{where} holds bytes of no known picture format; replace it or drop the row, or for raw pixels set "
            "task.image_shape to [height, width, channels]."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} holds a broken picture ({error}); replace it or drop the row.") from error
    if frames > 1:
        raise ValueError(f"{where} has an image of {frames} frames; an image is one picture, so write out one of them.")
    if image.mode not in (*GREY, *COLOUR):
        raise ValueError(
            f"{where} has an image of mode {image.mode!r}; 8-bit grey or colour is needed, so convert it with the "
            "window you want."
        )
    if image.mode in ("P", "PA"):  # a palette may have transparency
        image = image.convert("RGBA")
    return numpy.asarray(image.convert("L" if image.mode in GREY else "RGB"))


def _from_array(value: Any, where: str) -> Tensor:
    import numpy

    array = numpy.asarray(value)
    if array.dtype.kind not in "uifb" or array.ndim not in (2, 3):
        raise ValueError(f"{where} holds {json.dumps(str(value)[:40])}, which is no image; name an image column.")
    array = array.reshape(*array.shape[:2], -1)
    if array.shape[2] > 4 or not array.size:
        raise ValueError(f"{where} has an array of shape {array.shape}; it should be height, width and channels.")
    if array.dtype.kind in "fb" and 0 <= array.min() <= array.max() <= 1:
        array = array * 255  # floats in 0 to 1
    if not 0 <= array.min() <= array.max() <= 255:
        raise ValueError(f"{where} has pixels from {array.min()} to {array.max()}; they go to 255, or as floats to 1.")
    return torch.from_numpy(array.astype("uint8"))
