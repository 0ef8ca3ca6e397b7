"""Trees on disk: safetensors, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from fedlora.types import Tree

SEPARATOR = "/"  # between part and leaf; module paths have dots, never this


def save_tree(path: Path, tree: Tree, about: Mapping[str, str] | None = None) -> None:
    """Writes every leaf as ``part/leaf``, float32 as it is."""
    leaves = {
        f"{part}{SEPARATOR}{leaf}": x.detach().cpu().clone().contiguous()  # cloned: safetensors refuses shared memory
        for part, layer in tree.items()
        for leaf, x in layer.items()
    }
    write(path, save(leaves, {"format": "pt", **(about or {})}))


def load_tree(path: Path) -> Tree:
    """The tree that ``save_tree`` wrote."""
    tree: dict[str, dict[str, Any]] = {}
    for key, value in load_file(path).items():
        part, _, leaf = key.rpartition(SEPARATOR)
        tree.setdefault(part, {})[leaf] = value
    return tree


def absent(folder: str | Path) -> Path:
    """A folder that may be written: new or empty. ``ValueError`` where something would be overwritten."""
    path = Path(folder).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists already and is not empty; name another folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.rmdir()  # only to see that it can be made: nothing is left where the work then fails
    except OSError as error:
        raise ValueError(f"cannot write to {str(path)!r}: {error.strerror}; choose another folder.") from error
    return path


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
