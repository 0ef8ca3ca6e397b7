"""Image classification: one image, one label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.schema import PerMachine
from fedlora.tasks._base import Batch, Classification, Data, Examples, lengths_of_one
from fedlora.tasks.data import rows as source
from fedlora.tasks.data.image_transforms import Form, image_size, normal, processor_of
from fedlora.tasks.data.images import stretches
from fedlora.tasks.data.labels import Classes
from fedlora.tasks.networks.pretrained import network

# The columns that public sets use, tried in this order where task.image and task.label are not set.
IMAGES = ("image", "img", "pixels", "picture", "photo")
LABELS = ("label", "labels", "fine_label", "class", "target", "category")


@dataclass(frozen=True)
class ImageClassification(Classification):
    """The ``[task]`` table of image classification."""

    data: PerMachine[str]  # a hub id, a folder (files or an image folder), a file, or "digits" (embedded)
    data_config: PerMachine[str | None] = None
    encoding: PerMachine[str | None] = None  # of CSV and JSON files; None: as the file shows, else UTF-8
    delimiter: PerMachine[str | None] = None  # of CSV files; None: as the header shows
    image: PerMachine[str | None] = None  # column; None: the usual names
    label: PerMachine[str | None] = None
    train_split: PerMachine[str] = "train"
    test_split: PerMachine[str] = "test"
    image_shape: list[int] | None = None  # height, width, channels of raw uint8 bytes
    label_names: list[str] | None = None
    labels: list[int | str] | None = None  # keep only these labels, numbered anew
    train_rows: int | None = None
    test_rows: int | None = None
    metric: str = "accuracy"  # or "macro_f1", or with two labels "f1" or "matthews"
    augment: list[Literal["flip", "crop"]] | None = None  # in training only, drawn anew for every step
    auto: ClassVar[str] = "AutoModelForImageClassification"

    def __post_init__(self):
        super().__post_init__()
        source.text_format(self)
        shape = self.image_shape
        if shape is not None and (len(shape) != 3 or min(shape) < 1 or shape[2] > 4):
            raise ValueError(f"task.image_shape is {shape}; it is height, width and 1 to 4 channels.")

    def load(self, model: str, seed: int, client_column: str | None = None) -> Data:
        """Reads, checks and resizes both splits once; pixels stay uint8 until a batch is made."""
        splits = source.splits(
            self.data, self.data_config, self.train_split, [self.test_split], seed, source.text_format(self)
        )
        image = self.image or _usual(splits[0], IMAGES, "task.image")
        if self.label is None and _unlabelled(splits[0]):
            raise ValueError(
                f"the pictures of {self.data!r} have no labels; put them into a folder for each of two labels or more: "
                "train/LABEL/*.jpg and test/LABEL/*.jpg."
            )
        label = self.label or _usual(splits[0], LABELS, "task.label")
        classes = Classes.of(splits, label, self.label_names, self.labels)
        train, test = (
            source.subset(split, rows, classes.values(split, label), label, seed, what)
            for split, rows, what in zip(splits, (self.train_rows, self.test_rows), ("training", "test"))
        )
        found = classes.targets(train, test, label)
        form, shape = Form.of(model), self.image_shape or source.image_shape(self.data)
        both = (
            Examples(
                {"pixels": _pixels(split, image, shape, what, form), **form.constants()},
                labels,
                lengths_of_one(len(labels)),
                source.groups(split, client_column, what),
            )
            for split, labels, what in ((train, found.train, "training"), (test, found.test, "test"))
        )
        return Data(*both, found.names, found.notes, found.reading)

    def network(self, model: str, labels: int, seed: int) -> nn.Module:
        """The pretrained network with a new classifier."""
        from transformers import AutoModelForImageClassification

        self.fits(labels)
        return network(AutoModelForImageClassification, model, labels, seed)

    def probe(self, network: nn.Module) -> Batch:
        """Some noise, to compare two networks on."""
        shape = (4, getattr(network.config, "num_channels", 3), *image_size(network.config))
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def preprocessor(self, model: str) -> Any:
        """What has to be saved beside a network for others to use it; None where the model brings none."""
        return processor_of(model)

    def collate(self, examples: Examples, rows: Tensor) -> Batch:
        """Normalised float32 images, rows by channels by height by width."""
        return self._batch(examples, rows, examples.features["pixels"][rows])

    def augmented(self, examples: Examples, rows: Tensor, draws: torch.Generator) -> Batch:
        """The same, each image flipped or shifted by chance as ``augment`` says."""
        pixels = examples.features["pixels"][rows]
        for name in self.augment or ():
            pixels = AUGMENTATIONS[name](pixels, draws)
        return self._batch(examples, rows, pixels)

    def _batch(self, examples: Examples, rows: Tensor, pixels: Tensor) -> Batch:
        constants = {name: x for name, x in examples.features.items() if name != "pixels"}
        return {"pixel_values": normal(pixels, **constants), "labels": examples.labels[rows]}


def _unlabelled(split: Any) -> bool:
    """Whether this is a folder of pictures that lie in no label folders, or all in one."""
    return split.column_names == ["image"] or (
        split.column_names == ["image", "label"] and all(label is None for label in split["label"])
    )


def _usual(split: Any, names: Sequence[str], key: str) -> str:
    found = next((name for name in names if name in split.column_names), None)
    if found is None:
        raise ValueError(
            f"no column named {', '.join(names)} was found among {', '.join(split.column_names)}; set {key} to one "
            "of them."
        )
    return found


def _pixels(split: Any, image: str, shape: Sequence[int] | None, what: str, form: Form) -> Tensor:
    found, filled = torch.empty(0, dtype=torch.uint8), 0
    for some in stretches(split, image, shape, what):
        if not filled:
            form.check(some[0])
        fitted = form.fit(some)
        if not filled:  # at once for all rows: joined in the end, they would be there twice
            found = torch.empty(len(split), *fitted.shape[1:], dtype=torch.uint8)
        found[filled : filled + len(some)] = fitted
        filled += len(some)
    return found


def flipped(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    chosen = torch.rand(len(pixels), generator=draws) < 0.5
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


def cropped(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Each image in a black frame an eighth of its side wide, cut to its own size again at a place by chance."""
    rows, _, height, width = pixels.shape
    down, right = height // 8, width // 8
    framed = functional.pad(pixels, (right, right, down, down))
    ys, xs = (
        torch.randint(2 * most + 1, (rows, 1), generator=draws) + torch.arange(side)
        for most, side in ((down, height), (right, width))
    )
    cut = framed[torch.arange(rows)[:, None, None], :, ys[:, :, None], xs[:, None, :]]  # rows height width channels
    return cut.permute(0, 3, 1, 2).contiguous()


AUGMENTATIONS = {"flip": flipped, "crop": cropped}
