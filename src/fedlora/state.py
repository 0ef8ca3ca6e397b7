"""Trees on disk: safetensors, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedlora.limits import RefusedHeaderError, read_header
from fedlora.types import Layer, Tree

SEPARATOR = "/"  # between part and leaf; module paths have dots, never this


def save_tree(path: Path, tree: Tree, about: Mapping[str, str] | None = None) -> None:
    """Writes every leaf as ``part/leaf``, float32 as it is."""
    write(path, save(flat(tree), {"format": "pt", **(about or {})}))


def flat(tree: Tree) -> dict[str, Tensor]:
    """``part/leaf`` -> tensor, fit for safetensors."""
    return {
        f"{part}{SEPARATOR}{leaf}": x.detach().cpu().clone().contiguous()  # cloned: safetensors refuses shared memory
        for part, layer in tree.items()
        for leaf, x in layer.items()
    }


def nested(leaves: Mapping[str, Tensor]) -> Tree:
    """The tree whose leaves ``flat`` names, in memory of its own.

    Safetensors gives views at any offset, and the last bits of a factorisation depend on where a tensor begins.
    """
    tree: dict[str, dict[str, Tensor]] = {}
    for key, value in leaves.items():
        part, _, leaf = key.rpartition(SEPARATOR)
        tree.setdefault(part, {})[leaf] = value.clone()
    return tree


def load_tree(path: Path) -> Tree:
    """The tree that ``save_tree`` wrote. ``ValueError`` where the file is missing or broken."""
    try:
        read_header(path)
        return nested(load_file(path))
    except (RefusedHeaderError, SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read, the run was cut off or edited: {error}; run it anew."
        ) from error


def load_about(path: Path) -> dict[str, Any]:
    """The notes that ``save_tree`` put beside a tree under ``about``. ``ValueError`` where they are not there."""
    try:
        found = json.loads(read_header(path).metadata["about"])
        if not isinstance(found, dict):
            raise ValueError("its notes are no table")
    except (ValueError, KeyError, OSError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read, it was cut off or edited: {error!s}; run it anew.") from error
    return found


class Spilled(Mapping[str, Layer]):
    """A tree on disk: a part is read when it is asked for, and let go with what was made of it."""

    def __init__(self, path: Path, tree: Tree):
        self.path = path
        self.forms = {
            part: {leaf: torch.empty(x.shape, dtype=x.dtype, device="meta") for leaf, x in layer.items()}
            for part, layer in tree.items()
        }
        self.device = next((x.device for layer in tree.values() for x in layer.values()), torch.device("cpu"))
        save_tree(path, tree)

    def form(self, part: str) -> Layer:
        """Leaves and shapes, without values."""
        return self.forms[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __getitem__(self, part: str) -> Layer:
        with safe_open(self.path, framework="pt") as file:
            found = {leaf: file.get_tensor(f"{part}{SEPARATOR}{leaf}") for leaf in self.forms[part]}
        return {leaf: x.to(self.device) for leaf, x in found.items()}


def absent(folder: str | Path) -> Path:
    """A folder that may be written, new or empty; nothing is made yet. ``ValueError`` where it would overwrite."""
    path = Path(folder).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists already and is not empty; name another folder.")
    _within_reach(path)
    return path


def writable(file: str | Path) -> Path:
    """A file that may be written or written over; nothing is made yet. ``ValueError`` where it cannot be."""
    path = Path(file).expanduser()
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file in it.")
    _within_reach(path.parent)
    return path


def _within_reach(path: Path) -> None:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to {str(path)!r}: {str(there)!r} is no folder to write in; choose another.")


def save_json(path: Path, value: Any) -> None:
    """Indented JSON, written whole or not at all."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Through a temporary file beside it, synced and renamed: a crash or a full disk leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
