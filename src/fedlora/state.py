"""Trees on disk: safetensors, written whole or not at all."""

import hashlib
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
NOTES = "__metadata__"  # in the header of a safetensors file


def save_tree(path: Path, tree: Tree, about: Mapping[str, str] | None = None) -> None:
    """Writes every leaf as ``part/leaf``, float32 as it is."""
    write(path, serialize(flat(tree), {"format": "pt", **(about or {})}))


def serialize(tensors: dict[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes follow from its content: safetensors itself orders notes by chance."""
    data = save(tensors, dict(notes))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header = {NOTES: dict(sorted(header.pop(NOTES).items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[start:]


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


def digest(tree: Tree) -> str:
    """Names, shapes, dtypes and bits of all leaves as one short text."""
    found = hashlib.blake2b(digest_size=16)
    for part in sorted(tree):
        for leaf in sorted(tree[part]):
            x = tree[part][leaf].detach().cpu().contiguous()
            found.update(f"{part}{SEPARATOR}{leaf} {tuple(x.shape)} {x.dtype};".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write(path: Path, content: bytes) -> None:
    """Through a temporary file beside it, synced and renamed: a crash or a full disk leaves the old file.

    The folder is synced, too: what is written afterwards may count on this file, whatever happens to the machine.
    """
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
    synced(path.parent)


def swept(folder: Path) -> None:
    """Removes what ``write`` had begun in a folder when its process was killed; nobody may be writing there now."""
    for ending in ("safetensors", "json", "jsonl", "toml"):
        for path in folder.glob(f".*.{ending}.????????"):
            path.unlink()


def synced(folder: Path) -> None:
    """What was renamed or removed in a folder is so on the disk, where the system lets a folder be synced."""
    if os.name != "posix":
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
