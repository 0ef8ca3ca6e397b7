"""What a codec is: a tensor in fewer bytes and back, as a few plain tensors whose shapes are known beforehand.

A codec is pure: its draws come from a generator that it is given. Encoding runs on the processor, so that the bits are
one on every machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

Fields = Mapping[str, Tensor]  # an encoded tensor
Form = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # each field's shape and dtype
TINY = 2.0**-126  # float32's smallest normal number: what lies below is taken for zero


@dataclass(frozen=True)
class Codec(ABC):
    """One stage. ``form`` says what ``encode`` gives for a shape, so that a field can be refused before it is read.

    A codec of another package is a frozen dataclass that defines the four functions. It has no settings, except for a
    field ``share``, which is ``compression.top_k``. Leaves are encoded and decoded one by one, on the CPU. A tensor
    that is not finite must be encoded without an error, and decode to one that is not finite, so that the server
    refuses it.
    """

    coarse: ClassVar[bool] = False  # does it lose so much that only a difference is worth encoding?
    cite: ClassVar[str] = ""  # BibTeX of its paper
    goes_on: ClassVar[str | None] = None  # the field that a further stage may encode

    @abstractmethod
    def form(self, shape: tuple[int, ...]) -> Form:
        """The fields of an encoded float32 tensor of this shape."""

    @abstractmethod
    def encode(self, x: Tensor, draws: Generator) -> dict[str, Tensor]:
        """``x``, float32 and not empty, as fields."""

    @abstractmethod
    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Tensor:
        """Float32 of this shape. ``ValueError`` where fields of the right form are no encoding."""

    @abstractmethod
    def bound(self, x: Tensor) -> Tensor:
        """For each number of a finite ``x``: how far ``decode(encode(x))`` may lie from it."""


@dataclass(frozen=True)
class Chain:
    """Stages one after the other: each encodes what the one before lets go on."""

    stages: tuple[Codec, ...]

    def __post_init__(self) -> None:
        for stage, after in zip(self.stages, self.stages[1:]):
            if stage.goes_on is None or after.goes_on is not None:
                raise ValueError(
                    f"the stages {', '.join(type(s).__name__ for s in self.stages)} cannot follow each other; top-k "
                    "comes first, and one codec after it."
                )

    @property
    def coarse(self) -> bool:
        """Whether only differences are worth encoding."""
        return any(stage.coarse for stage in self.stages)

    def form(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The fields of all stages."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for stage in self.stages:
            found |= stage.form(shape)
            if stage is not self.stages[-1]:
                shape, _ = found.pop(str(stage.goes_on))
        return found

    def encode(self, x: Tensor, draws: Generator) -> dict[str, Tensor]:
        """``x`` as fields; of a tensor without numbers, fields without numbers."""
        if x.is_meta:
            return {
                name: torch.empty(shape, dtype=kind, device="meta")
                for name, (shape, kind) in self.form(tuple(x.shape)).items()
            }
        found: dict[str, Tensor] = {}
        x = x.detach().cpu().float()
        for stage in self.stages:
            found |= stage.encode(x, draws)
            if stage is not self.stages[-1]:
                x = found.pop(str(stage.goes_on))
        return found

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Tensor:
        """The tensor. ``ValueError`` where the fields are not those of this shape, said before they are read."""
        self.check(fields, shape)
        if any(x.is_meta for x in fields.values()):
            return torch.empty(shape, device="meta")
        return self._decode(self.stages, fields, shape)

    def check(self, fields: Fields, shape: tuple[int, ...]) -> None:
        """``ValueError`` where names, shapes or dtypes are not those of an encoded tensor of this shape."""
        needed = self.form(shape)
        for name in sorted(needed.keys() | fields.keys()):
            found = (tuple(fields[name].shape), fields[name].dtype) if name in fields else None
            if found != needed.get(name):
                raise ValueError(f"an encoded leaf of shape {shape} has {name!r} as {found}, not {needed.get(name)}")

    def bound(self, x: Tensor) -> Tensor:
        """For each number of ``x``: how far it may end from what it was."""
        return self.stages[0].bound(x) if len(self.stages) == 1 else self._bound(x)

    def _bound(self, x: Tensor) -> Tensor:
        """What the first stage cuts, or what the second one does to what is left: its largest error for all."""
        first, rest = self.stages[0], Chain(self.stages[1:])
        left = first.encode(x, Generator())[str(first.goes_on)]
        return torch.maximum(first.bound(x), rest.bound(left).max().expand_as(x))

    def _decode(self, stages: tuple[Codec, ...], fields: Fields, shape: tuple[int, ...]) -> Tensor:
        first, name = stages[0], stages[0].goes_on
        if len(stages) == 1 or name is None:
            return first.decode(fields, shape)
        inner = self._decode(stages[1:], fields, first.form(shape)[name][0])
        return first.decode({**fields, name: inner}, shape)


def longest(shape: tuple[int, ...]) -> int:
    """The axis along which numbers share a scale: a LoRA factor has as many scales as ranks, ``A`` like ``B``."""
    return max(range(len(shape)), key=lambda axis: shape[axis])


def in_lines(x: Tensor) -> Tensor:
    """``(lines, length)``: the numbers of a line lie along the longest axis."""
    if x.ndim == 0:
        return x.reshape(1, 1)
    axis = longest(tuple(x.shape))
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def from_lines(lines: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``in_lines``."""
    if not shape:
        return lines.reshape(())
    axis = longest(shape)
    return lines.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]).movedim(-1, axis).contiguous()


def line_count(shape: tuple[int, ...]) -> int:
    """How many lines a tensor of this shape has."""
    return torch.Size(shape).numel() // max(1, max(shape, default=1))


def steps(x: Tensor, levels: int) -> Tensor:
    """``(lines,)``: the distance between two codes, ``max|line| / levels``; NaN where a line is not finite."""
    found = in_lines(x).abs().amax(-1) / levels
    found = torch.where(found < TINY, torch.zeros_like(found), found)
    return torch.where(found.isfinite(), found, torch.full_like(found, float("nan")))


def drawn(x: Tensor, scale: Tensor, levels: int, draws: Generator) -> Tensor:
    """``(lines, length)`` int8 in ``[-levels, levels]``: ``x / scale``, up or down at random, right in the mean."""
    lines, usable = in_lines(x).double(), (scale > 0) & scale.isfinite()
    y = torch.where(usable[:, None], lines / torch.where(usable, scale, 1.0).double()[:, None], 0.0)
    chance = torch.rand(y.shape, generator=draws, dtype=torch.float64)
    return (y + chance).floor().clamp(-levels, levels).to(torch.int8)
