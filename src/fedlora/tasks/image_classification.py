"""Image classification: one image, one label."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.tasks import data as source
from fedlora.tasks.networks import located, network, quietly
from fedlora.tasks.task import Batch, Classification, Data, Examples, lengths_of_one

RESIZE_ROWS = 512  # images resized at a time: float copies of a whole split would be large


@dataclass(frozen=True)
class ImageClassification(Classification):
    """The ``[task]`` table of image classification."""

    data: str  # a hub id, a folder (files or an image folder), a file, or "digits" (embedded)
    data_config: str | None = None
    image: str = "image"
    label: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    image_shape: list[int] | None = None  # height, width, channels of raw uint8 bytes
    label_names: list[str] | None = None
    labels: list[int | str] | None = None  # keep only these labels, numbered anew
    train_rows: int | None = None
    test_rows: int | None = None
    metric: str = "accuracy"  # or, with two labels, "f1" or "matthews"
    auto: ClassVar[str] = "AutoModelForImageClassification"

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Reads, checks and resizes both splits once; pixels stay uint8 until a batch is made."""
        splits = source.splits(self.data, self.data_config, self.train_split, [self.test_split], seed)
        train, test = (
            source.subset(split, rows, self.labels, self.label, seed, what)
            for split, rows, what in zip(splits, (self.train_rows, self.test_rows), ("training", "test"))
        )
        found = source.labels(train, test, self.label, self.label_names)
        train_labels, test_labels, names = source.renumbered(found, self.labels)
        form = _Form.of(model)
        both = (
            Examples(
                {"pixels": self._pixels(split, form), "mean": form.mean, "std": form.std},
                labels,
                lengths_of_one(len(labels)),
                source.groups(split, client_column, what),
            )
            for split, labels, what in ((train, train_labels, "training"), (test, test_labels, "test"))
        )
        return Data(*both, names)

    def _pixels(self, split: Any, form: "_Form") -> Tensor:
        shape = self.image_shape or source.image_shape(self.data)
        values = source.column(split, self.image, "task.image")
        stacks = (
            form.fit([_decoded(value, shape, self.image) for value in values[i : i + RESIZE_ROWS]])
            for i in range(0, len(values), RESIZE_ROWS)
        )
        return torch.cat(list(stacks))

    def network(self, model: str, labels: int, seed: int) -> nn.Module:
        """The pretrained network with a new classifier."""
        from transformers import AutoModelForImageClassification

        return network(AutoModelForImageClassification, model, labels, seed)

    def probe(self, network: nn.Module) -> Batch:
        """Some noise, to compare two networks on."""
        c = network.config
        size = (c.image_size, c.image_size) if isinstance(c.image_size, int) else tuple(c.image_size)
        return {"pixel_values": torch.randn(4, c.num_channels, *size, generator=torch.Generator().manual_seed(0))}

    def preprocessor(self, model: str) -> Any:
        """What has to be saved beside a network for others to use it; None where the model brings none."""
        from transformers import AutoImageProcessor

        try:
            return quietly(AutoImageProcessor, model)
        except ValueError:
            return None

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Normalised float32 images, rows by channels by height by width."""
        pixels = examples.features["pixels"][rows].float() / 255
        normal = (pixels - examples.features["mean"]) / examples.features["std"]
        return {"pixel_values": normal, "labels": examples.labels[rows]}


@dataclass(frozen=True)
class _Form:
    """What a model wants to see."""

    height: int
    width: int
    channels: int
    mean: Tensor  # (channels, 1, 1), of pixels in 0 to 1
    std: Tensor

    @classmethod
    def of(cls, model: str) -> "_Form":
        from transformers import AutoConfig
        from transformers.image_processing_utils import BaseImageProcessor

        folder = located(model)
        config = quietly(AutoConfig, model)
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        try:
            settings, _ = BaseImageProcessor.get_image_processor_dict(folder)
        except OSError:  # a model without a processor: half and half, the ViTs' own
            settings = {}
        channels = getattr(config, "num_channels", 3)
        mean, std = (_each(settings.get(key, 0.5), channels) for key in ("image_mean", "image_std"))
        return cls(height, width, channels, mean, std)

    def fit(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 images (height, width, channels), of any sizes, as one uint8 stack of the model's size."""
        return torch.stack([self._resized(image) for image in images])

    def _resized(self, image: Tensor) -> Tensor:
        x = image.permute(2, 0, 1)
        if x.shape[0] != self.channels:  # grey to colour by repetition, colour to grey by its mean
            x = x[:1].expand(self.channels, -1, -1) if self.channels > 1 else x[:3].float().mean(0, keepdim=True)
        if x.shape[1:] == (self.height, self.width):
            return x.to(torch.uint8).contiguous()
        small = functional.interpolate(x[None].float(), (self.height, self.width), mode="bilinear", antialias=True)
        return small[0].round().clamp(0, 255).to(torch.uint8)


def _each(value: Any, channels: int) -> Tensor:
    values = [float(value)] * channels if isinstance(value, int | float) else [float(v) for v in value]
    values = values if len(values) == channels else [sum(values) / len(values)] * channels
    return torch.tensor(values).reshape(channels, 1, 1)


def _decoded(value: Any, shape: Sequence[int] | None, name: str) -> Tensor:
    """One image as uint8 (height, width, channels)."""
    import numpy
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, dict):
        value = value.get("bytes") or Path(value["path"]).read_bytes()
    if isinstance(value, bytes) and shape is not None:
        expected = shape[0] * shape[1] * shape[2]
        if len(value) != expected:
            raise ValueError(
                f"column {name!r} has an image of {len(value)} bytes; the shape {list(shape)} needs {expected}; "
                "correct task.image_shape."
            )
        return torch.frombuffer(bytearray(value), dtype=torch.uint8).reshape(*shape)
    if isinstance(value, bytes):
        try:
            value = Image.open(io.BytesIO(value))
        except UnidentifiedImageError as error:
            raise ValueError(
                f"column {name!r} holds bytes of no known picture format; "
                "set task.image_shape to [height, width, channels] for raw pixels."
            ) from error
    if isinstance(value, Image.Image):
        value = value.convert("L" if value.mode in ("1", "L", "I", "I;16") else "RGB")
    array = numpy.asarray(value)
    if array.dtype == object or array.ndim not in (2, 3):
        raise ValueError(
            f"column {name!r} holds {json.dumps(str(value)[:40])}, which is no image; name an image column."
        )
    if array.dtype.kind == "f" and array.size and array.max() <= 1:
        array = array * 255  # floats in 0 to 1
    return torch.from_numpy(array.clip(0, 255).astype("uint8")).reshape(*array.shape[:2], -1)
