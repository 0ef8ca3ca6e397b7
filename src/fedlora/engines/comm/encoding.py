"""Encoded leaves among others: their names, the notes that are kept beside them, and what they are differences to."""

import torch
from torch import Generator, Tensor

from fedlora.seeds import derive_seed
from fedlora.types import Layer

MARK, SHAPE = "@", "shape"  # an encoded leaf's fields are LEAF@FIELD; SHAPE where it is not that of its start
OWED, CODED, SAID = "_owed.", "_coded.", "_said."  # notes: what is still to be said, the encoded leaf, how often


def codable(x: Tensor) -> bool:
    """Whether a leaf can be encoded: it holds numbers, and some."""
    return x.is_floating_point() and x.numel() > 0


def draws(seed: int, direction: str, name: str) -> Generator:
    """The generator for one leaf in one direction."""
    return Generator().manual_seed(derive_seed(seed, direction, name))


def with_owed(x: Tensor, owed: Tensor | None) -> Tensor:
    """What is to be said and what is owed from before, where the leaf still has that shape."""
    return x if owed is None or owed.shape != x.shape else x + owed.to(x)


def base_of(start: Layer, leaf: str, shape: tuple[int, ...]) -> Tensor | None:
    """The leaf that a difference is to; None where there is none of that shape."""
    found = start.get(leaf)
    return found if found is not None and tuple(found.shape) == shape else None


def known(part: str, leaf: str, layer: Layer) -> Tensor:
    """The leaf of that name. ``ValueError`` where there is none."""
    if leaf not in layer:
        raise ValueError(f"an encoded leaf {leaf!r} of {part!r} came, which the model does not have")
    return layer[leaf]


def shape_of(part: str, leaf: str, fields: Layer, start: Layer) -> tuple[int, ...]:
    """The shape that a leaf has: its start's, or one that it says and that is no larger."""
    usual = tuple(known(part, leaf, start).shape)
    if SHAPE not in fields:
        return usual
    told = fields[SHAPE]
    fits = told.dtype == torch.int32 and tuple(told.shape) == (len(usual),)
    shape = tuple(told.tolist()) if fits else ()
    if not fits or not all(1 <= size <= most for size, most in zip(shape, usual)):
        raise ValueError(f"the encoded leaf {leaf!r} of {part!r} says a shape that is not within {usual}")
    return shape


def apart(layer: Layer) -> tuple[Layer, dict[str, dict[str, Tensor]]]:
    """The leaves that crossed as they are, and the fields of the encoded ones."""
    plain: dict[str, Tensor] = {}
    coded: dict[str, dict[str, Tensor]] = {}
    for name, x in layer.items():
        leaf, mark, field = name.rpartition(MARK)
        if mark:
            coded.setdefault(leaf, {})[field] = x
        else:
            plain[name] = x
    return plain, coded
