"""Where a run stands, on disk: written after each round, whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.engines.federation import Federation
from fedlora.engines.loop import Standing
from fedlora.folds import Folds
from fedlora.state import load_about, load_tree, save_tree
from fedlora.types import Factors

STATE, FOLDS = "checkpoint.safetensors", "folds"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the server's state, and each round's folds in a file of its own, so that they are written once."""

    folder: Path
    config: str  # a digest of the configuration: another one cannot go on from here
    token: str  # of the run: parties keep their state under it

    def save(self, at: Standing) -> None:
        """The folds first, then the state that counts them: a crash between the two leaves the round before."""
        known = self.about()["folds"] if self else 0  # a file beyond is of a round that was run again
        for number in range(known, len(at.folds)):
            save_tree(self._fold(number), folded(at.folds.entries[number - at.folds.start]))
        about = {
            "number": at.number, "folds": len(at.folds), "counted": {str(k): v for k, v in at.counted.items()},
            "token": self.token, "config": self.config, "conduct": at.conduct,
        }  # fmt: skip
        save_tree(self.folder / STATE, at.shared, {"about": json.dumps(about)})

    def load(self, f: Federation, begin: Standing) -> Standing:
        """The standing that was saved, its folds in the model's base, in the order in which they were made."""
        about = self.about()
        saved = load_tree(self.folder / STATE)
        begin.shared = {
            # A leaf with its first values stays the very object, so that nobody is sent it.
            part: {leaf: own if _equal(own := layer.get(leaf), x) else x for leaf, x in saved.get(part, {}).items()}
            for part, layer in begin.shared.items()
        }
        for number in range(about["folds"]):
            begin.folds.append(unfolded(load_tree(self._fold(number))))
            f.model.fold(begin.folds.entries[-1])
        begin.number, begin.counted = about["number"], {int(k): v for k, v in about["counted"].items()}
        begin.conduct = about.get("conduct", {})
        return begin

    def about(self) -> dict[str, Any]:
        """What the checkpoint says of itself. ``ValueError`` where it is of another configuration."""
        about = load_about(self.folder / STATE)
        if about.get("config") != self.config:
            raise ValueError(
                f"{str(self.folder)!r} holds a run of another configuration; choose another folder, "
                "or go on with the configuration it began with."
            )
        return about

    def __bool__(self) -> bool:
        return (self.folder / STATE).exists()

    def _fold(self, number: int) -> Path:
        return self.folder / FOLDS / f"{number:06d}.safetensors"


def folded(folds: Folds) -> dict[str, Mapping]:
    """One round's folds as a tree: part ``PART/i`` with the leaves ``U`` and ``V``."""
    return {f"{part}/{i}": f._asdict() for part, several in folds.items() for i, f in enumerate(several)}


def unfolded(tree: Mapping[str, Mapping]) -> Folds:
    """The folds that ``folded`` wrote."""
    found: dict[str, dict[int, Factors]] = {}
    for key, factors in tree.items():
        part, _, place = key.rpartition("/")
        found.setdefault(part, {})[int(place)] = Factors(**factors)
    return {part: tuple(several[i] for i in sorted(several)) for part, several in found.items()}


def config_digest(table: Mapping[str, Any]) -> str:
    """Of all that decides a run's bits: not of the machine's own settings, nor of how long the run is."""
    training = table.get("training", {})
    flat = training.get("schedule", "constant") == "constant" and not training.get("warmup")
    solved = "target_epsilon" in table.get("privacy", {})  # for so many rounds
    free = ("engine", "flower", *(["rounds"] if flat and not solved else []))  # a schedule is over all rounds
    left = {key: value for key, value in table.items() if key not in free}
    return hashlib.blake2b(json.dumps(left, sort_keys=True).encode(), digest_size=16).hexdigest()


def _equal(own: Any, x: Any) -> bool:
    return own is not None and own.shape == x.shape and bool((own.cpu() == x).all())
