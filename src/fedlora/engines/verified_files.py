"""Files whose names end with a digest of their content, so that one that was cut off or altered is noticed.

A tree is kept with each leaf's layout in memory: a product's last bits depend on the order of its factors' numbers.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedlora.files import SEPARATOR, Header, flat, nested, read_header, serialize, write
from fedlora.types import Tree

ENDING = ".safetensors"
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)


class RefusedError(ValueError):
    """A file that is not what was written; the text says why."""


def packed(tree: Tree, about: Mapping[str, Any]) -> bytes:
    """A tree and what is to be said of it, as the bytes of a safetensors file."""
    leaves = {f"{part}{SEPARATOR}{leaf}": x for part, layer in tree.items() for leaf, x in layer.items()}
    orders = {key: order for key, x in leaves.items() if (order := _order(x)) is not None}
    return serialize(flat(tree), {"format": "pt", "about": json.dumps({**about, "orders": orders})})


def unpacked(content: bytes) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tree that ``packed`` was given, in main memory of its own, and what was said of it."""
    try:
        about = _about(content)
        leaves = load(content)
        for key, order in about.pop("orders").items():
            back = sorted(range(len(order)), key=order.__getitem__)
            leaves[key] = leaves[key].permute(order).contiguous().permute(back)
    except BROKEN as error:
        raise RefusedError(f"it holds no tree of leaves ({error})") from error
    return {part: dict(layer) for part, layer in nested(leaves).items()}, about


def seal(folder: Path, stem: str, content: bytes) -> str:
    """Writes ``STEM-DIGEST.safetensors``, and returns that name."""
    name = f"{stem}-{_digest(content)}{ENDING}"
    write(folder / name, content)
    return name


def unseal(path: Path) -> bytes:
    """The content of a sealed file. ``RefusedError`` where it is missing, or not what its name says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{path.name} cannot be read ({error.strerror})") from error
    if path.name != f"{path.name.rpartition('-')[0]}-{_digest(content)}{ENDING}":
        raise RefusedError(f"{path.name} was cut off or altered")
    return content


def about(path: Path) -> dict[str, Any]:
    """What a file says of itself, without its leaves and unchecked; nothing where it cannot be read."""
    try:
        return _told(read_header(path))
    except (OSError, *BROKEN):
        return {}


def _about(content: bytes) -> dict[str, Any]:
    return _told(read_header(content))


def _told(header: Header) -> dict[str, Any]:
    found = json.loads(header.metadata["about"])
    if not isinstance(found, dict):
        raise ValueError("its notes are no table")
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _order(x: Tensor) -> list[int] | None:
    """The dimensions from the widest stride to the narrowest, where that is not their own order."""
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), d))
    return order if x.permute(order).is_contiguous() else None


def moved(tree: Tree, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The tree on a device."""
    return {part: {leaf: x.to(device) for leaf, x in layer.items()} for part, layer in tree.items()}
