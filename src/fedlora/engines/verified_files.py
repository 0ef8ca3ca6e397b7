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
from torch import Tensor

from fedlora.files import Header, decode_tree, encode_tree, flatten, read_header, unflatten, write
from fedlora.types import Tree

ENDING = ".safetensors"
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)


class RefusedError(ValueError):
    """A file that is not what was written; the text says why."""


def encode_state(tree: Tree, about: Mapping[str, Any]) -> bytes:
    """A tree with its leaves' layouts in memory, and plain values beside it, as the bytes of a safetensors file."""
    orders = {key: order for key, x in flatten(tree).items() if (order := _order(x)) is not None}
    return encode_tree(tree, {"format": "pt", "about": json.dumps({**about, "orders": orders})})


def decode_state(content: bytes) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tree that ``encode_state`` was given, in main memory of its own, and the values beside it."""
    try:
        about = _about(read_header(content))
        leaves = flatten(decode_tree(content))
        for key, order in about.pop("orders").items():
            back = sorted(range(len(order)), key=order.__getitem__)
            leaves[key] = leaves[key].permute(order).contiguous().permute(back)
    except BROKEN as error:
        raise RefusedError(f"it holds no tree of leaves ({error})") from error
    return unflatten(leaves), about


def write_verified(folder: Path, stem: str, content: bytes) -> str:
    """Writes ``STEM-DIGEST.safetensors``, and returns that name."""
    name = f"{stem}-{_digest(content)}{ENDING}"
    write(folder / name, content)
    return name


def read_verified(path: Path) -> bytes:
    """The content of such a file. ``RefusedError`` where it is missing, or not what its name says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{path.name} cannot be read ({error.strerror})") from error
    if path.name != f"{path.name.rpartition('-')[0]}-{_digest(content)}{ENDING}":
        raise RefusedError(f"{path.name} was cut off or altered")
    return content


def read_about(path: Path) -> dict[str, Any]:
    """The values beside a file's tree, unverified; empty where the file cannot be read."""
    try:
        return _about(read_header(path))
    except (OSError, *BROKEN):
        return {}


def _about(header: Header) -> dict[str, Any]:
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


def to_device(tree: Tree, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The tree on a device."""
    return {part: {leaf: x.to(device) for leaf, x in layer.items()} for part, layer in tree.items()}
