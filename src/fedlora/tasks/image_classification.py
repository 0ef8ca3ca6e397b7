"""Image classification: one image, one label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Classification, Data, Examples, TableTask, lengths_of_one
from fedlora.tasks.data.image_transforms import ImageTransform, image_size, load_image_processor, normalize
from fedlora.tasks.data.images import read_images
from fedlora.tasks.data.labels import Classes
from fedlora.tasks.data.rows import client_groups, image_shape
from fedlora.tasks.networks.pretrained import load_with_new_head

# The usual columns of public data sets, tried in this order if task.image and task.label are not set.
IMAGES = ("image", "img", "pixels", "picture", "photo")
LABELS = ("label", "labels", "fine_label", "class", "target", "category")


@dataclass(frozen=True)
class ImageClassification(Classification, TableTask):
    """The ``[task]`` table of image classification."""

    image: PerMachine[str | None] = None  # column; None: the usual names
    label: PerMachine[str | None] = None
    image_shape: list[int] | None = None  # height, width, channels of raw uint8 bytes
    label_names: list[str] | None = None
    labels: list[int | str] | None = None  # keep only these labels, numbered from 0
    metric: str = "accuracy"  # or "macro_f1", or with two labels "f1" or "matthews"
    augment: list[Literal["flip", "crop"]] | None = None  # in training only, drawn again for every step
    auto: ClassVar[str] = "AutoModelForImageClassification"
    accepts_loading: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.image_shape
        if shape is not None and (len(shape) != 3 or min(shape) < 1 or shape[2] > 4):
            raise ValueError(f"task.image_shape is {shape}; it is height, width and 1 to 4 channels.")

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Read, check and resize both splits once; pixels stay uint8 until they are collated."""
        splits = self.load_splits(seed)
        image = self.image or _usual_column(splits[0], IMAGES, "task.image")
        if self.label is None and _is_unlabelled(splits[0]):
            raise ValueError(
                f"the pictures of {self.data!r} have no labels; put them into a folder for each of two labels or more: "
                "train/LABEL/*.jpg and test/LABEL/*.jpg."
            )
        label = self.label or _usual_column(splits[0], LABELS, "task.label")
        classes = Classes.of(splits, label, self.label_names, self.labels)
        train, test = self.draw_splits(splits, seed, label, classes)
        targets = classes.targets(train, test, label)
        transform, shape = ImageTransform.of(model), self.image_shape or image_shape(self.data)
        train_rows, test_rows = (
            Examples(
                {"pixels": _read_pixels(split, image, shape, role, transform), **transform.constants()},
                labels,
                lengths_of_one(len(labels)),
                client_groups(split, client_column, role),
            )
            for split, labels, role in ((train, targets.train, "training"), (test, targets.test, "test"))
        )
        return Data(train_rows, test_rows, targets.names, targets.notes, targets.reading)

    def network(self, model: str, labels: int, seed: int, loading: Any = None) -> nn.Module:
        from transformers import AutoModelForImageClassification

        self.check_labels(labels)
        return load_with_new_head(AutoModelForImageClassification, model, labels, seed, loading)

    def probe(self, network: nn.Module) -> Batch:
        shape = (4, getattr(network.config, "num_channels", 3), *image_size(network.config))
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def preprocessor(self, model: str) -> Any:
        return load_image_processor(model)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Return normalized float32 images, rows by channels by height by width."""
        return self._batch(examples, rows, examples.features["pixels"][rows])

    def collate_for_training(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        """Return normalized images with the random augmentations of ``augment``."""
        pixels = examples.features["pixels"][rows]
        for name in self.augment or ():
            pixels = AUGMENTATIONS[name](pixels, draws)
        return self._batch(examples, rows, pixels)

    def _batch(self, examples: Examples, rows: Tensor, pixels: Tensor) -> Batch:
        constants = {name: x for name, x in examples.features.items() if name != "pixels"}
        return {"pixel_values": normalize(pixels, **constants), "labels": examples.labels[rows]}


def _is_unlabelled(split: Any) -> bool:
    """Whether this is a folder of images without label folders, or with only one."""
    names = split.column_names
    return names == ["image"] or (names == ["image", "label"] and all(label is None for label in split["label"]))


def _usual_column(split: Any, names: Sequence[str], key: str) -> str:
    for name in names:
        if name in split.column_names:
            return name
    raise ValueError(f"no column {', '.join(names)} among {', '.join(split.column_names)}; set {key} to one of them.")


def _read_pixels(split: Any, image: str, shape: Sequence[int] | None, role: str, transform: ImageTransform) -> Tensor:
    pixels, filled = torch.empty(0, dtype=torch.uint8), 0
    for images in read_images(split, image, shape, role):
        if not filled:
            transform.check(images[0])
        resized = transform.fit(images)
        if not filled:  # allocated once: concatenation at the end would need the memory twice
            pixels = torch.empty(len(split), *resized.shape[1:], dtype=torch.uint8)
        pixels[filled : filled + len(images)] = resized
        filled += len(images)
    return pixels


def flip(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    chosen = torch.rand(len(pixels), generator=draws) < 0.5
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


def crop(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Pad each image with an eighth of its side in black, and cut it to its size at a random place."""
    rows, _, height, width = pixels.shape
    down, right = height // 8, width // 8
    padded = functional.pad(pixels, (right, right, down, down))
    ys, xs = (
        torch.randint(2 * most + 1, (rows, 1), generator=draws) + torch.arange(side)
        for most, side in ((down, height), (right, width))
    )
    cut = padded[torch.arange(rows)[:, None, None], :, ys[:, :, None], xs[:, None, :]]  # rows height width channels
    return cut.permute(0, 3, 1, 2).contiguous()


AUGMENTATIONS = {"flip": flip, "crop": crop}
