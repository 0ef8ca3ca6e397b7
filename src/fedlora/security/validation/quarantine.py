"""Bad uploads on disk, for whoever wants to know what was in them."""

from collections.abc import Mapping
from pathlib import Path

from fedlora.files import save_tree
from fedlora.security.validation.screen import Bad
from fedlora.security.validation.settings import Hygiene
from fedlora.types import Tree

FOLDER = "quarantine"


def keep(folder: Path | None, number: int, bad: Mapping[int, Bad], limits: Hygiene) -> None:
    """Writes ``quarantine/ROUND-CLIENT.safetensors`` (rounds from 1), as far as number and size allow.

    What is there already counts; the first ones stay, since a fault is best seen where it began.
    """
    if folder is None or not bad:
        return
    place = folder / FOLDER
    there = [path.stat().st_size for path in place.glob("*.safetensors")] if place.is_dir() else []
    count, size = len(there), float(sum(there))
    for client, (reason, tree) in sorted(bad.items()):
        size += _bytes(tree)
        if count >= limits.keep_files or size > limits.keep_mb * 1e6:
            return
        count += 1
        save_tree(place / f"{number}-{client}.safetensors", tree, {"reason": reason})


def _bytes(tree: Tree) -> int:
    forms: Tree = getattr(tree, "forms", tree)
    return sum(x.numel() * x.element_size() for layer in forms.values() for x in layer.values())
