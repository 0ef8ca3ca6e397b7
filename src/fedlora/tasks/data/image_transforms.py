"""The size, crop, resampling filter and normalization of a vision model's own image processor, on uint8 pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.tasks.networks.pretrained import load_quietly, resolve_model

BILINEAR = 2  # PIL's number of the filter
NEAR = 2.5 / 255  # the largest change of a pixel in 0 to 1 that rounding explains


@dataclass(frozen=True)
class ImageTransform:
    """Resizes images to the model's input size, and has the constants of their normalization."""

    channels: int
    size: tuple[int, int]  # height and width, unless the processor sets them
    scale: Tensor  # (): pixels are divided by it
    mean: Tensor  # (channels, 1, 1), of pixels in 0 to 1
    std: Tensor
    processor: Any = None  # the model's own, if it has one
    plain: bool = True  # whether a bilinear resize to ``size`` is all that changes the size

    @classmethod
    def of(cls, model: str) -> "ImageTransform":
        """Return the transform of a model. Without a processor, mean and standard deviation are 0.5, as for ViTs."""
        from transformers import AutoConfig

        config, processor = load_quietly(AutoConfig, model), load_image_processor(model)
        size, channels = image_size(config), getattr(config, "num_channels", 3)
        settings = {} if processor is None else processor.to_dict()
        normal = settings.get("do_normalize", True)
        middle, spread = (settings.get("image_mean"), settings.get("image_std")) if normal else (0.0, 1.0)
        mean, std = (_per_channel(0.5 if value is None else value, channels) for value in (middle, spread))
        factor = (settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 1.0
        return cls(channels, size, torch.tensor(1 / factor), mean, std, processor, _is_plain(settings, size))

    def fit(self, images: Sequence[Tensor]) -> Tensor:
        """Return uint8 images (height, width, channels) of any sizes as one uint8 stack of the model's size."""
        resized = [self._resize(self._set_channels(image)) for image in images]
        sizes = sorted({tuple(x.shape[1:]) for x in resized})
        if len(sizes) > 1:
            raise ValueError(
                f"the model's image processor makes images of unequal size, such as {sizes[0]} and {sizes[1]}; give it "
                "a size of height and width, or a crop_size, in its preprocessor_config.json."
            )
        return torch.stack(resized)

    def constants(self) -> dict[str, Tensor]:
        """Return the arguments of ``normalize`` beside the pixels."""
        return {"scale": self.scale, "mean": self.mean, "std": self.std}

    def check(self, image: Tensor) -> None:
        """Raise ``ValueError`` if the model's own processor gives another result for this image."""
        if self.processor is None:
            return
        x = self._set_channels(image)
        ours, wanted = normalize(self._resize(x), **self.constants()), self._process(x)
        if ours.shape != wanted.shape and self.plain:
            return  # the processor does not resize, and the network needs its own size
        if ours.shape != wanted.shape or float(((ours - wanted) * self.std).abs().max() * self.scale / 255) > NEAR:
            raise ValueError(
                f"the model's image processor, {type(self.processor).__name__}, does more than resize, crop, rescale "
                "and normalise an image; name another model."
            )

    def _set_channels(self, image: Tensor) -> Tensor:
        """Return the image channels first: grey is repeated for a color model, color is averaged for a grey one."""
        x = image.permute(2, 0, 1)
        if x.shape[0] == self.channels:
            return x
        if x.shape[0] == 1:
            return x.expand(self.channels, -1, -1)
        if self.channels != 1:
            raise ValueError(f"the model sees {self.channels} channels, and the images have {x.shape[0]}.")
        return x.float().mean(0, keepdim=True)

    def _resize(self, x: Tensor) -> Tensor:
        if not self.plain:
            return self._process(x, do_rescale=False, do_normalize=False)
        if x.shape[1:] == self.size:
            return x.to(torch.uint8).contiguous()
        # Rounded once at the end; PIL rounds after each direction, so the results differ by at most 1/255.
        small = functional.interpolate(x[None].float(), self.size, mode="bilinear", antialias=True)
        return small[0].round().clamp(0, 255).to(torch.uint8)

    def _process(self, x: Tensor, **steps: bool) -> Tensor:
        image = x.round().to(torch.uint8).numpy()
        options = {"input_data_format": "channels_first", "return_tensors": "pt", "do_convert_rgb": False}
        return self.processor(image, **options, **steps)["pixel_values"][0]


def normalize(pixels: Tensor, scale: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 pixels as the network's float32 input."""
    return (pixels.float() / scale - mean) / std


def load_image_processor(model: str) -> Any:
    """Return the model's image processor or None; always PIL's, so that pixels do not depend on installed packages."""
    from transformers import AutoImageProcessor
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        BaseImageProcessor.get_image_processor_dict(resolve_model(model))
    except OSError:
        return None
    return load_quietly(AutoImageProcessor, model, backend="pil")


def image_size(config: Any) -> tuple[int, int]:
    """Return the height and width in a model's configuration."""
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _is_plain(settings: dict[str, Any], size: tuple[int, int]) -> bool:
    if settings.get("do_center_crop") or settings.get("do_pad"):
        return False
    if not settings or not settings.get("do_resize", True):
        return True
    wanted = dict(settings.get("size") or {})
    return wanted == {"height": size[0], "width": size[1]} and settings.get("resample") in (None, BILINEAR)


def _per_channel(value: Any, channels: int) -> Tensor:
    values = [float(value)] * channels if isinstance(value, int | float) else [float(v) for v in value]
    values = values if len(values) == channels else [sum(values) / len(values)] * channels
    return torch.tensor(values).reshape(channels, 1, 1)
