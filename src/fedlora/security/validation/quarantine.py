"""Rejected uploads on disk, for inspection."""

from collections.abc import Mapping
from pathlib import Path

from fedlora.files import save_tree
from fedlora.security.validation.screen import Rejected
from fedlora.security.validation.settings import Validation
from fedlora.types import Tree

FOLDER = "quarantine"


def write_quarantine(folder: Path | None, number: int, rejected: Mapping[int, Rejected], limits: Validation) -> None:
    """Writes ``quarantine/ROUND-CLIENT.safetensors`` (rounds from 1) within the limits of number and size.

    Existing files count. The first ones stay, since a fault is best seen where it began.
    """
    if folder is None or not rejected:
        return
    place = folder / FOLDER
    sizes = [path.stat().st_size for path in place.glob("*.safetensors")] if place.is_dir() else []
    count, size = len(sizes), float(sum(sizes))
    for client, (reason, tree) in sorted(rejected.items()):
        size += _bytes(tree)
        if count >= limits.keep_files or size > limits.keep_mb * 1e6:
            return
        count += 1
        save_tree(place / f"{number}-{client}.safetensors", tree, {"reason": reason})


def _bytes(tree: Tree) -> int:
    forms: Tree = getattr(tree, "forms", tree)
    return sum(x.numel() * x.element_size() for layer in forms.values() for x in layer.values())
