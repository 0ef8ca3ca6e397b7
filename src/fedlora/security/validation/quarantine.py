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

    Existing files count. The first ones are kept, since they show the cause of a fault best.
    """
    if folder is None or not rejected:
        return
    place = folder / FOLDER
    sizes = [path.stat().st_size for path in place.glob("*.safetensors")]
    for client, (reason, tree) in sorted(rejected.items()):
        forms: Tree = getattr(tree, "forms", tree)  # of a tree on disk, without reading it
        sizes.append(sum(x.nbytes for layer in forms.values() for x in layer.values()))
        if len(sizes) > limits.keep_files or sum(sizes) > limits.keep_mb * 1e6:
            return
        save_tree(place / f"{number}-{client}.safetensors", tree, {"reason": reason})
