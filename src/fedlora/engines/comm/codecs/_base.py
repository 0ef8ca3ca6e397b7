"""The interface of codecs: a tensor as a few plain tensors with fewer bytes, and back.

A codec is pure: it draws from the generator that it is given. It encodes on the CPU, so the bits are the same on every
machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

Fields = Mapping[str, Tensor]  # an encoded tensor
Form = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each field
TINY = 2.0**-126  # the smallest normal number of float32; smaller values count as zero


@dataclass(frozen=True)
class Codec(ABC):
    """One stage. ``form`` gives the fields of ``encode`` for a shape, so that a field can be refused before it is read.

    A codec of another package is a frozen dataclass that defines the four functions. It has no settings, except for a
    field ``share``, which is ``compression.top_k``. Leaves are encoded and decoded one by one, on the CPU. A tensor
    that is not finite must be encoded without an error and decode to one that is not finite, so that the server
    refuses it.
    """

    coarse: ClassVar[bool] = False  # whether the error is so large that only differences are encoded
    cite: ClassVar[str] = ""  # BibTeX of its paper
    inner_field: ClassVar[str | None] = None  # the field that a second stage may encode

    @abstractmethod
    def form(self, shape: tuple[int, ...]) -> Form:
        """Return the fields of an encoded float32 tensor of this shape."""

    @abstractmethod
    def encode(self, x: Tensor, draws: Generator) -> dict[str, Tensor]:
        """Encode ``x``, which is float32 and not empty."""

    @abstractmethod
    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Tensor:
        """Decode to float32 of this shape. ``ValueError`` if fields of the right form are no encoding."""

    @abstractmethod
    def bound(self, x: Tensor) -> Tensor:
        """Return the largest error of ``decode(encode(x))`` for each number of a finite ``x``."""


@dataclass(frozen=True)
class Cast(Codec):
    """A codec that casts each number to another dtype."""

    dtype: ClassVar[torch.dtype]

    def form(self, shape):
        return {"values": (shape, self.dtype)}

    def decode(self, fields, shape):
        return fields["values"].float()


@dataclass(frozen=True)
class Quantized(Codec):
    """A codec with integers of up to ``levels`` and a float32 scale a line, ``max|line| / levels``."""

    levels: ClassVar[int]

    def quantize(self, x: Tensor, draws: Generator) -> tuple[Tensor, Tensor]:
        """Round ``x / scale`` up or down at random, with ``x / scale`` as the mean.

        Returns (lines, length) int8, and the (lines,) scales; the scale of a line that is not finite is NaN.
        """
        lines = in_lines(x)
        scale = lines.abs().amax(-1) / self.levels
        scale = torch.where(scale.isfinite(), torch.where(scale < TINY, 0.0, scale), torch.nan)
        usable = (scale > 0) & scale.isfinite()
        y = torch.where(usable[:, None], lines.double() / torch.where(usable, scale, 1.0).double()[:, None], 0.0)
        chance = torch.rand(y.shape, generator=draws, dtype=torch.float64)
        return (y + chance).floor().clamp(-self.levels, self.levels).to(torch.int8), scale

    def bound(self, x):
        """Return a step and the rounding of float32, ``s (1 + 2⁻¹⁶) + 2⁻¹¹⁹``."""
        step = x.abs().amax(longest(tuple(x.shape)) if x.ndim else (), keepdim=bool(x.ndim)) / self.levels
        return (step * (1 + 2.0**-16) + 2.0**-119).expand_as(x)


@dataclass(frozen=True)
class Chain:
    """One or two stages; the second one encodes a field of the first."""

    stages: tuple[Codec, ...]

    def __post_init__(self) -> None:
        for stage, after in zip(self.stages, self.stages[1:]):
            if stage.inner_field is None or after.inner_field is not None:
                raise ValueError(
                    f"the stages {', '.join(type(s).__name__ for s in self.stages)} cannot follow each other; top-k "
                    "comes first, and one codec after it."
                )

    @property
    def coarse(self) -> bool:
        """Whether only differences are encoded."""
        return any(stage.coarse for stage in self.stages)

    def form(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the fields of all stages."""
        first, *rest = self.stages
        form = dict(first.form(shape))
        for stage in rest:
            form |= stage.form(form.pop(str(first.inner_field))[0])
        return form

    def encode(self, x: Tensor, draws: Generator) -> dict[str, Tensor]:
        """Encode ``x``; a meta tensor gives meta fields."""
        if x.is_meta:
            form = self.form(tuple(x.shape))
            return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in form.items()}
        first, *rest = self.stages
        fields = first.encode(x.detach().cpu().float(), draws)
        for stage in rest:
            fields |= stage.encode(fields.pop(str(first.inner_field)), draws)
        return fields

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Tensor:
        """Decode. ``ValueError`` if names, shapes or dtypes are not those of this shape, before a field is read."""
        needed = self.form(shape)
        for name in sorted(needed.keys() | fields.keys()):
            actual = (tuple(fields[name].shape), fields[name].dtype) if name in fields else None
            if actual != needed.get(name):
                raise ValueError(f"an encoded leaf of shape {shape} has {name!r} as {actual}, not {needed.get(name)}")
        if any(x.is_meta for x in fields.values()):
            return torch.empty(shape, device="meta")
        first, *rest = self.stages
        for stage in rest:
            name = str(first.inner_field)
            fields = {**fields, name: stage.decode(fields, first.form(shape)[name][0])}
        return first.decode(fields, shape)

    def bound(self, x: Tensor) -> Tensor:
        """Return the largest error of each number of ``x``."""
        first, *rest = self.stages
        bound = first.bound(x)
        for stage in rest:
            inner = first.encode(x, Generator())[str(first.inner_field)]
            bound = torch.maximum(bound, stage.bound(inner).max().expand_as(x))
        return bound


def longest(shape: tuple[int, ...]) -> int:
    """Return the axis along which numbers share a scale: LoRA's ``A`` and ``B`` both have one scale a rank."""
    return max(range(len(shape)), key=lambda axis: shape[axis])


def in_lines(x: Tensor) -> Tensor:
    """Reshape to ``(lines, length)``; a line has the numbers along the longest axis."""
    if x.ndim == 0:
        return x.reshape(1, 1)
    axis = longest(tuple(x.shape))
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def from_lines(lines: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Invert ``in_lines``."""
    if not shape:
        return lines.reshape(())
    axis = longest(shape)
    return lines.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]).movedim(-1, axis).contiguous()


def line_count(shape: tuple[int, ...]) -> int:
    """Return the number of lines of a tensor of this shape."""
    return torch.Size(shape).numel() // max(1, max(shape, default=1))
