"""Pictures as they lie in data: files, encoded bytes, raw pixels, arrays; each as uint8 or refused by its row."""

import io
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.tasks.data import rows as source

GREY = ("1", "L", "LA", "La")
COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV")
STRETCH = 512  # pictures that are unpacked at a time: those of a whole split may be far larger than what is kept


def stretches(split: Any, name: str, shape: Sequence[int] | None, what: str) -> Iterator[list[Tensor]]:
    """A column's pictures, uint8 (height, width, 1 or 3 channels), some at a time.

    ``shape`` is that of raw bytes. ``ValueError`` names the row of a picture that cannot be read.
    """
    import datasets

    source.present(split, name, "task.image")
    split = split.select_columns([name])
    if isinstance(split.features[name], datasets.Image):  # unpacked here, where the row is known
        split = split.cast_column(name, datasets.Image(decode=False))
    for start in range(0, len(split), STRETCH):
        values = split[start : start + STRETCH][name]
        yield [_decoded(value, shape, f"column {name!r}, {what} row {start + i}") for i, value in enumerate(values)]


def _decoded(value: Any, shape: Sequence[int] | None, where: str) -> Tensor:
    if isinstance(value, dict):
        value, where = _packed(value, where)
    if value is None:
        raise ValueError(f"{where} has no picture; drop the row.")
    if isinstance(value, bytes) and shape is not None:
        return _raw(value, shape, where)
    if isinstance(value, bytes):
        value = _opened(value, where)
    return _array(value, where)


def _packed(value: dict[str, Any], where: str) -> tuple[bytes | None, str]:
    """A picture's bytes, and where it is in the words of its owner."""
    path = value.get("path")
    where = f"{where} ({path})" if path else where
    if value.get("bytes") is not None or not path:
        return value.get("bytes"), where
    try:
        return Path(path).read_bytes(), where
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}; put the file back or drop the row.") from error


def _raw(value: bytes, shape: Sequence[int], where: str) -> Tensor:
    height, width, channels = shape
    if len(value) != height * width * channels:
        raise ValueError(
            f"{where} has an image of {len(value)} bytes; the shape {list(shape)} needs {height * width * channels}; "
            "correct task.image_shape."
        )
    return _opaque(torch.frombuffer(bytearray(value), dtype=torch.uint8).reshape(height, width, channels))


def _opened(value: bytes, where: str) -> Any:
    """An encoded picture as an array."""
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(value))
        # A phone's MPO holds the photograph and a small copy of it.
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
    if image.mode in ("P", "PA"):  # a palette may have transparency of its own
        image = image.convert("RGBA")
    return numpy.asarray(image.convert("L" if image.mode in GREY else "RGB"))


def _array(value: Any, where: str) -> Tensor:
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
        raise ValueError(
            f"{where} has pixels from {array.min()} to {array.max()}; they should be from 0 to 255, or floats to 1."
        )
    return _opaque(torch.from_numpy(array.astype("uint8")))


def _opaque(image: Tensor) -> Tensor:
    """Without transparency, which models do not see."""
    return image[..., :-1] if image.shape[-1] in (2, 4) else image
