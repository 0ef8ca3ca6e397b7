"""What a vision model wants to see: its own processor's size, crop, filter and normalisation, pixels kept as uint8."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.tasks.networks.pretrained import located, quietly

BILINEAR = 2  # PIL's number of the filter
NEAR = 2.5 / 255  # what rounding may do to a pixel in 0 to 1


@dataclass(frozen=True)
class Form:
    """Brings pictures of any size to the model's, and says how they are normalised."""

    channels: int
    size: tuple[int, int]  # height and width where the processor leaves them open
    scale: Tensor  # (): pixels are divided by it
    mean: Tensor  # (channels, 1, 1), of pixels in 0 to 1
    std: Tensor
    processor: Any = None  # the model's own, where there is one
    plain: bool = True  # whether all that happens to the size is a bilinear resize to ``size``

    @classmethod
    def of(cls, model: str) -> "Form":
        """The form of a model by hub id or folder; without a processor, the ViTs' own: half and half."""
        from transformers import AutoConfig

        config, processor = quietly(AutoConfig, model), processor_of(model)
        size, channels = image_size(config), getattr(config, "num_channels", 3)
        settings = {} if processor is None else processor.to_dict()
        normal = settings.get("do_normalize", True)
        middle, spread = (settings.get("image_mean"), settings.get("image_std")) if normal else (0.0, 1.0)
        mean, std = (_each(0.5 if value is None else value, channels) for value in (middle, spread))
        factor = (settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 1.0
        return cls(channels, size, torch.tensor(1 / factor), mean, std, processor, _is_plain(settings, size))

    def fit(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 images (height, width, channels), of any sizes, as one uint8 stack of the model's size."""
        fitted = [self._sized(self._coloured(image)) for image in images]
        sizes = sorted({tuple(x.shape[1:]) for x in fitted})
        if len(sizes) > 1:
            raise ValueError(
                f"the model's image processor makes images of unequal size, such as {sizes[0]} and {sizes[1]}; give it "
                "a size of height and width, or a crop_size, in its preprocessor_config.json."
            )
        return torch.stack(fitted)

    def constants(self) -> dict[str, Tensor]:
        """What ``normal`` needs beside pixels."""
        return {"scale": self.scale, "mean": self.mean, "std": self.std}

    def check(self, image: Tensor) -> None:
        """``ValueError`` where the model's own processor makes something else of this image."""
        if self.processor is None:
            return
        x = self._coloured(image)
        ours, wanted = normal(self._sized(x), **self.constants()), self._processed(x)
        if ours.shape != wanted.shape and self.plain:
            return  # it resizes nothing, and the network wants its own size
        if ours.shape != wanted.shape or float(((ours - wanted) * self.std).abs().max() * self.scale / 255) > NEAR:
            raise ValueError(
                f"the model's image processor, {type(self.processor).__name__}, does more than resize, crop, rescale "
                "and normalise an image; name another model."
            )

    def _coloured(self, image: Tensor) -> Tensor:
        """Channels first, as many as the model has: grey to colour by repetition, colour to grey by its mean."""
        x = image.permute(2, 0, 1)
        if x.shape[0] == self.channels:
            return x
        if x.shape[0] == 1:
            return x.expand(self.channels, -1, -1)
        if self.channels != 1:
            raise ValueError(f"the model sees {self.channels} channels, and the images have {x.shape[0]}.")
        return x.float().mean(0, keepdim=True)

    def _sized(self, x: Tensor) -> Tensor:
        if not self.plain:
            return self._processed(x, do_rescale=False, do_normalize=False)
        if x.shape[1:] == self.size:
            return x.to(torch.uint8).contiguous()
        # One rounding at the end, where PIL has one after each direction: within 1/255 of it.
        small = functional.interpolate(x[None].float(), self.size, mode="bilinear", antialias=True)
        return small[0].round().clamp(0, 255).to(torch.uint8)

    def _processed(self, x: Tensor, **steps: bool) -> Tensor:
        image = x.round().to(torch.uint8).numpy()
        about = {"input_data_format": "channels_first", "return_tensors": "pt", "do_convert_rgb": False}
        found: Tensor = self.processor(image, **about, **steps)["pixel_values"][0]
        return found


def normal(pixels: Tensor, scale: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 pixels as the float32 that the network is given."""
    return (pixels.float() / scale - mean) / std


def processor_of(model: str) -> Any:
    """The model's image processor; None where it brings none.

    Always the one on PIL: with another, the pixels would depend on what else is installed.
    """
    from transformers import AutoImageProcessor
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        BaseImageProcessor.get_image_processor_dict(located(model))
    except OSError:
        return None
    return quietly(AutoImageProcessor, model, backend="pil")


def image_size(config: Any) -> tuple[int, int]:
    """Height and width that a model's configuration says."""
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _is_plain(settings: dict[str, Any], size: tuple[int, int]) -> bool:
    if settings.get("do_center_crop") or settings.get("do_pad"):
        return False
    if not settings.get("do_resize", True) or not settings:
        return True
    wanted = settings.get("size") or {}
    filters = (None, BILINEAR)
    return dict(wanted) == {"height": size[0], "width": size[1]} and settings.get("resample") in filters


def _each(value: Any, channels: int) -> Tensor:
    values = [float(value)] * channels if isinstance(value, int | float) else [float(v) for v in value]
    values = values if len(values) == channels else [sum(values) / len(values)] * channels
    return torch.tensor(values).reshape(channels, 1, 1)
